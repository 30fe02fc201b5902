from functools import partial
import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import Expert, many, read, write
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.merge.combine import Where, mean
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE
from moe_merge_nb.rewrites.bank import bank
from moe_merge_nb.rewrites.group import average, merge_groups, reduce_by, rewrite
from moe_merge_nb.rewrites.statistics import calibrate
from moe_merge_nb.rewrites.task_vectors import *
from moe_merge_nb.streams.tasks import toy_stream


def test_ties_of_task_vectors_that_agree_is_the_mean():
    torch.manual_seed(0)
    base = read(Expert(8, 3))
    sign = {n: torch.randn_like(t).sign() for n, t in base.items()}
    agreed = [{n: t + sign[n] * torch.rand_like(t) for n, t in base.items()} for _ in range(3)]
    found, wanted = ties(agreed, None, base, density=1.), mean(agreed)
    for name in base: torch.testing.assert_close(found[name], wanted[name])


def test_dare_keeps_the_task_vector_in_expectation():
    torch.manual_seed(0)
    tau = torch.randn(2, 50)
    draws = torch.stack([dropped(tau, .3, seed) for seed in range(4000)])
    error = (1 / .3 - 1)**.5 * tau.abs() / 4000**.5                                     # standard error of the mean
    assert ((draws.mean(0) - tau).abs() < 5 * error).all() and (draws.mean(0) - tau).abs().max() > 0
    assert ((draws == 0).double().mean() - .7).abs() < .01


def test_dare_is_seeded_and_leaves_the_random_state_alone():
    import numpy
    torch.manual_seed(0)
    base, a, b = [read(Expert(8, 3)) for _ in range(3)]
    before, elsewhere = torch.get_rng_state(), numpy.random.get_state()[1].copy()
    same = lambda p, q: all(torch.equal(p[n], q[n]) for n in p)
    for combine in (dare, dare_ties):
        found = combine([a, b], torch.tensor([5, 3]), base)
        assert same(found, combine([a, b], torch.tensor([5, 3]), base))
        assert not same(found, combine([a, b], torch.tensor([5, 3]), base, seed=1))
        assert same(found, combine([a, b], torch.tensor([5, 4]), base))                 # usage decides nothing
        for where in (Where('text'), Where(block=1), Where(task=0), Where(turn=1)):      # another merge, another mask
            assert not same(found, combine([a, b], torch.tensor([5, 3]), base, where=where))
    assert torch.equal(before, torch.get_rng_state()) and (elsewhere == numpy.random.get_state()[1]).all()


def test_one_expert_alone_comes_back():
    torch.manual_seed(0)
    base, s = read(Expert(8, 3)), read(Expert(8, 3))
    exact = [
        partial(task_arithmetic, lam=1.),
        partial(ties, density=1.),
        partial(dare, lam=1., density=1.),
        partial(dare_ties, density=1.),
    ]
    for combine in exact:
        for n, t in combine([s], torch.tensor([4]), base).items(): torch.testing.assert_close(t, s[n])


def test_every_rule_merges_during_training():
    torch.manual_seed(0)
    for combine in (task_arithmetic, ties, dare, dare_ties):
        moe = MoE('image', 0, 8, Experts(n_experts=4, rank=3, shared_init=True))
        moe.add_task()
        for p in moe.experts.parameters(): p.data += torch.randn_like(p)
        sources, used = [read(moe.experts[e]) for e in (1, 3)], torch.tensor([4, 9, 1, 7])
        name = f'moe_merge_nb.rewrites.task_vectors.{combine.__name__}'
        assert merge_once(moe, used, Merge(combine=name))['target'] == 2
        wanted, found = combine(sources, used[[1, 3]], read(moe.base)), read(moe.experts[2])
        for n, t in wanted.items(): assert torch.equal(t, found[n])
        with pytest.raises(ValueError, match='experts.shared_init=true'):
            merge_once(moe, used, Merge(combine=name, align=True))


def test_equal_to_peft():
    utils = pytest.importorskip('peft.utils.merge_utils') # a development check: `pip install peft`
    from unittest.mock import patch
    torch.manual_seed(0)
    base = read(Expert(16, 5))
    several = [{n: t + torch.randn_like(t) for n, t in base.items()} for _ in range(4)]
    tau, used, ones = task_vectors(several, base), torch.tensor([9, 7, 4, 1]), torch.ones(4)
    def equal(state, wanted):
        torch.testing.assert_close(task_vectors([state], base)[0], wanted, rtol=1e-5, atol=1e-5)
    equal(task_arithmetic(several, used, base), utils.task_arithmetic(list(tau), .4 * ones))
    for density in (.2, .5, .9): equal(ties(several, used, base, density=density), utils.ties(list(tau), ones, density))
    masks = (dropped(torch.ones_like(tau), .5, 0) > 0).float()
    drawn = lambda: patch('torch.bernoulli', side_effect=list(masks))
    with drawn(): equal(dare(several, used, base), utils.dare_linear(list(tau), .4 * ones, .5))
    with drawn(): equal(dare_ties(several, used, base), utils.dare_ties(list(tau), ones, .5))


def test_reductions_keep_the_budget_and_reduce_by_the_mean_is_the_control():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3, shared_init=True).eval()
    for _ in stream: net.add_task()
    for p in net.moes.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.3)
    found, x = calibrate(net, tokenizer, stream, images=8), stream[0].test[0][0][None]
    answer = lambda rule, budget: rewrite(net, found, rule, budget).encode_image(x, 1)
    for combine in (task_arithmetic, ties, dare, dare_ties):
        rule = reduce_by(combine)
        torch.testing.assert_close(answer(rule, 5), net.encode_image(x, 1))
        assert sum(len(m.experts) for m in rewrite(net, found, rule, 2).moes) == 2 * len(net.moes)
        assert not torch.equal(answer(partial(rule, lam=.1), 2), answer(rule, 2))
    assert torch.equal(answer(reduce_by(mean), 2), answer(average, 2))
    apart = AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in stream: apart.add_task()
    found = calibrate(apart, tokenizer, stream, images=8)
    with pytest.raises(ValueError, match='experts.shared_init=true'): rewrite(apart, found, reduce_by(ties), 2)


def test_copies_merge_without_loss():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=3, rank=4, shared_init=True))
    moe.add_task()
    for p in moe.experts.parameters(): p.data += torch.randn_like(p)
    b = bank(moe)
    b.states[1] = b.states[0]
    for combine in (mean, partial(task_arithmetic, lam=.5), partial(ties, density=1.), partial(dare_ties, density=1.)):
        new = merge_groups(b, torch.tensor([9, 5, 4]), [[0, 1], [2]], combine)
        for n, t in new.states[0].items(): torch.testing.assert_close(t, b.states[0][n])
