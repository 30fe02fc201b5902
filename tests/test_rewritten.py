"A rewritten model keeps what is frozen, works with shared blocks, and cannot be shared as if it had been trained"

from dataclasses import replace
import pytest
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.rewrites.bank import banks, bind, close, n_expert_parameters, with_banks
from moe_merge_nb.rewrites.dern import dern
from moe_merge_nb.rewrites.group import rewrite
from moe_merge_nb.rewrites.reduce import last, load_banks, recover, save_banks
from moe_merge_nb.rewrites.rules import REWRITES, SPLITS
from moe_merge_nb.rewrites.statistics import calibrate
from moe_merge_nb.run.share import save
from moe_merge_nb.streams.tasks import toy_stream

STREAM = toy_stream(2, n_train=16, n_test=8)

def model_of(**kinds):
    "Adapters that say something, some of them frozen"
    clip, tokenizer = load_clip()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AdaptedCLIP(clip, **dict(n_experts=4, rank=4, shared_init=True, scale=.5) | kinds)
        for _ in STREAM: model.add_task()
        for m in model.moes:
            for e in m.experts: torch.nn.init.normal_(e.up.weight, std=.1)
            for r in m.routers: torch.nn.init.normal_(r.gate)
            if len(m.experts) > 1: m.freeze([1, 3])
    return model.eval(), tokenizer

def frozen(model): return [m.frozen.nonzero().flatten().tolist() for m in model.moes]

def test_what_is_frozen_stays_frozen(tmp_path):
    model, tokenizer = model_of()
    n = len(model.moes)
    assert frozen(with_banks(model, banks(model))) == [[1, 3]] * n
    assert frozen(with_banks(model, [close(b, [0, 1]) for b in banks(model)])) == [[1]] * n     # 2 and 3 are left
    pair = with_banks(model, [bind(b, [[0, 2], [1, 3]], b.states[:2]) for b in banks(model)])
    assert frozen(pair) == frozen(with_banks(pair, banks(pair))) == [[1]] * n
    halves = with_banks(model, SPLITS['union_of_experts'](banks(model), 2))
    assert frozen(halves) == [[2, 3, 6, 7]] * n
    path = save_banks(banks(pair), tmp_path/'banks.safetensors')
    assert frozen(with_banks(model, load_banks(path)[0])) == [[1]] * n
    none = model_of()[0]
    for m in none.moes: m.frozen[:] = False
    assert banks(none)[0].frozen is None and frozen(with_banks(none, banks(none))) == [[]] * n
    with pytest.raises(ValueError, match='4 experts, but frozen is'):
        replace(banks(model)[0], frozen=torch.ones(3).bool())

def test_neurons_of_a_frozen_expert_are_frozen_where_they_go():
    model, tokenizer = model_of()
    found = dern(banks(model), calibrate(model, tokenizer, STREAM, images=8), 2)
    for b in found: assert b.frozen.shape == (len(b.states),) and b.frozen.any()
    assert not all(b.frozen is None for b in found)

def test_every_rewrite_works_with_shared_blocks():
    model, tokenizer = model_of(shared_blocks=2)
    stats, sizes = calibrate(model, tokenizer, STREAM, images=8), [len(m.experts) for m in model.moes]
    wide = [i for i, n in enumerate(sizes) if n > 1]
    assert 0 < len(wide) < len(sizes)
    x = STREAM[0].test[0][0][None]
    for name, rule in REWRITES.items():
        small = rewrite(model, stats, rule, 2)
        left = [len(m.experts) for m in small.moes]
        assert sum(left[i] for i in wide) <= 2 * len(wide), name
        for i, n in enumerate(sizes): # the shared expert is what it was
            if n > 1: continue
            [mine], [before] = small.moes[i].experts, model.moes[i].experts
            assert torch.equal(mine.up.weight, before.up.weight)
        assert small.encode_image(x, 1).isfinite().all() and n_expert_parameters(banks(small)) > 0
    for name in ('drop_least_used', 'msmoe', 'average'):                        # the whole budget changes nothing
        same = rewrite(model, stats, REWRITES[name], 4)
        torch.testing.assert_close(same.encode_image(x, 1), model.encode_image(x, 1))

@torch.no_grad()
def test_splits_work_with_shared_blocks():
    model, _ = model_of(shared_blocks=2)
    x = STREAM[0].test[0][0][None]
    for name in ('union_of_experts', 'fine_grained'):
        parts = with_banks(model, SPLITS[name](banks(model), 2))
        torch.testing.assert_close(parts.encode_image(x, 1), model.encode_image(x, 1), rtol=1e-4, atol=1e-4)
    assert with_banks(model, SPLITS['select_parts'](banks(model), 2)).encode_image(x, 1).isfinite().all()

def test_shared_blocks_recover_and_are_evaluated():
    model, tokenizer = model_of(shared_blocks=2)
    small = rewrite(model, calibrate(model, tokenizer, STREAM, images=8), REWRITES['drop_least_used'], 2)
    fitted = recover(small, model, tokenizer, STREAM, iterations=2, images=4)
    assert set(last(fitted, tokenizer, STREAM)) == set(STREAM.names) and frozen(fitted) == frozen(small)

def test_the_budget_is_that_of_blocks_with_several_experts():
    model, tokenizer = model_of(shared_blocks=1)
    stats = calibrate(model, tokenizer, STREAM, images=8)
    for budget in (0, 5):
        with pytest.raises(ValueError, match='choose 1 ... 4'): rewrite(model, stats, REWRITES['average'], budget)
    with pytest.raises(ValueError, match='statistics for'): rewrite(model, stats[1:], REWRITES['average'], 2)
    alone, _ = model_of(n_experts=1, top_k=1, shared_init=False)
    same = rewrite(alone, calibrate(alone, tokenizer, STREAM), REWRITES['dern'], 1)
    assert sum(len(m.experts) for m in same.moes) == 7

def test_a_rewritten_model_is_not_written_as_if_it_had_been_trained(tmp_path):
    model, _ = model_of()
    small = with_banks(model, [close(b, [0]) for b in banks(model)])
    with pytest.raises(ValueError, match='rewritten after training: save its banks by save_banks'):
        save(small, tmp_path/'x.safetensors')
    assert not (tmp_path/'x.safetensors').exists()
