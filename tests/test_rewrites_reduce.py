import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.streams.tasks import prompts, toy_stream
from moe_merge_nb.rewrites.bank import banks, with_banks
from moe_merge_nb.rewrites.group import average, drop_least_used, rewrite
from moe_merge_nb.rewrites.reduce import *
from moe_merge_nb.rewrites.statistics import calibrate


def test_last_is_the_last_row_of_the_matrix():
    from dataclasses import replace
    from moe_merge_nb.streams.tasks import Stream
    from moe_merge_nb.learn.evaluate import evaluate
    from moe_merge_nb.select.select import Oracle
    torch.manual_seed(0)
    clip_, tok = load_clip()
    toys, net = toy_stream(n_tasks=2), AdaptedCLIP(clip_, n_experts=3, rank=4).eval()
    for _ in toys: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.1)
    oracle = Oracle().fit(None).fit(None)
    toys = Stream('toys', tuple(replace(t, templates=(*t.templates, 'no {} at all')) for t in toys))
    rows = evaluate(net, tok, toys, selectors=dict(oracle=oracle), after='x', progress=False).matrix
    assert last(net, tok, toys) == dict(rows[['task', 'accuracy']].values)


def test_recovery_trains_the_experts_that_are_left_and_nothing_else():
    from dataclasses import replace
    torch.manual_seed(0)
    clip_, tok = load_clip()
    toys, net = toy_stream(n_tasks=2), AdaptedCLIP(clip_, n_experts=4, rank=4).eval()
    for _ in toys: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.1)
    small = rewrite(net, calibrate(net, tok, toys, images=8), average, 2)
    state, old = torch.get_rng_state(), {k: v.clone() for k, v in small.state_dict().items()}
    done = recover(small, net, tok, toys, iterations=40, lr=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    changed = {k for k, v in done.state_dict().items() if not torch.equal(v, old[k])}
    assert changed and all('.experts.' in k for k in changed), sorted(changed)[:3]
    assert all(torch.equal(v, old[k]) for k, v in small.state_dict().items())
    x = torch.stack([toys[0].train[i][0] for i in range(32)])
    words = tok(prompts(toys[0]))
    packed = with_banks(small, [replace(b, stored=9) for b in banks(small)])
    with pytest.raises(ValueError, match='compressed'): recover(packed, net, tok, toys)
    to_net = lambda m: recovery_loss(logits_of(m, x, words, 0), logits_of(net, x, words, 0))
    assert to_net(done) < to_net(small)


def test_a_sweep_that_was_cut_off_goes_on():
    import tempfile
    from unittest.mock import patch
    import moe_merge_nb.rewrites.reduce as module
    torch.manual_seed(0)
    clip_, tok = load_clip('toy', 'random')
    toys, net = toy_stream(n_tasks=2, n_train=16, n_test=8), AdaptedCLIP(clip_, n_experts=4, rank=2).eval()
    for _ in toys: net.add_task()
    rules = dict(average=average, drop=drop_least_used)
    with tempfile.TemporaryDirectory() as d:
        kw = dict(file=f'{d}/rows.csv', iterations=0, seed=3, commit='c')
        rows = reductions(net, tok, toys, rules=dict(average=average), budgets=[2, 3], init='own', **kw)
        with patch.object(module, 'reduction', wraps=reduction) as counted:
            rows = module.reductions(net, tok, toys, rules=rules, budgets=[2, 3], init='own', **kw)
        assert counted.call_count == 2 and list(rows.rule) == ['average', 'average', 'drop', 'drop']
        assert len(reductions(net, tok, toys, rules=rules, budgets=[2], init='shared', **kw)) == 6
    assert (rows.experts == rows.budget * len(net.moes)).all()


def test_a_rewritten_model_survives_the_disk():
    import tempfile
    torch.manual_seed(0)
    clip_, tok = load_clip('toy', 'random')
    net = AdaptedCLIP(clip_, n_experts=4, rank=2, shared_init=True, gate='top_p').eval()
    net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    small = rewrite(net, calibrate(net, tok, toy_stream(n_tasks=1), images=4), average, 2)
    x = torch.randn(3, 3, 32, 32)
    with tempfile.TemporaryDirectory() as d:
        kept, about = load_banks(save_banks(banks(small), f'{d}/banks.safetensors', rule='average'))
    assert torch.equal(with_banks(net, kept).encode_image(x, 0), small.encode_image(x, 0))
    assert about == dict(rule='average')
