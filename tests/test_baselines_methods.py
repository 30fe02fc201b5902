from dataclasses import asdict
import pytest
from moe_merge_nb.baselines.methods import *
def differences(a, b): return {k for k in a if a[k] != b[k]}


def test_merging_is_the_only_difference_between_moe_and_moe_merge():
    for protocol in PROTOCOLS:
        a, b = asdict(method('moe', protocol)), asdict(method('moe_merge', protocol))
        assert differences(a, b) == {'name', 'merge'}


def test_baselines_differ_from_full_fine_tuning_in_the_baseline_and_its_learning_rate():
    ft = asdict(method('finetune'))
    for name in ('lwf', 'wise_ft', 'zscl', 'icarl'):
        m = asdict(method(name))
        assert differences(ft, m) - {'train'} == {'name', 'baseline'}
        assert differences(ft['train'], m['train']) <= {'lr'}


def test_the_published_protocol_is_chosen_by_stream_and_shots():
    m = method('moe_merge', 'mtil')
    published = dict(iterations=1000, batch=64, n_warmup=100, label_smoothing=.2, weight_decay=0, betas=(.9, .999))
    assert {k: getattr(m.train, k) for k in published} == published
    assert (m.experts.rank, m.experts.n_experts) == (64, 22)
    assert m.train.lr_of('Aircraft') == 5e-3 and m.train.lr_of('EuroSAT') == 1e-4
    few = method('moe_merge', 'mtil', shots=5)
    assert few.train.iterations == 500 and few.train.lr_of('Aircraft') == 8e-3
    assert method('moe', 'mini', shots=5) == method('moe', 'mini')
