from functools import partial
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import Expert, read
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.merge.combine import mean, usage_weighted
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.rewrites.bank import bank, layer
from moe_merge_nb.rewrites.group import average, rewrite
from moe_merge_nb.rewrites.statistics import Statistics, calibrate, output_similarity, outputs
from moe_merge_nb.rewrites.submoe import *
from moe_merge_nb.streams.tasks import toy_stream
import pytest, torch


def test_coordinates_keep_all_distances():
    torch.manual_seed(0)
    Y = torch.randn(6, 50, 8)
    plain, directions = coordinates(Y), coordinates(Y, True)
    wanted = (Y[:, None] - Y[None]).double().square().sum(-1).mean(-1)
    torch.testing.assert_close(torch.cdist(plain, plain)**2, wanted, atol=1e-6, rtol=1e-6)
    wanted = 2 - 2 * output_similarity(Y).double()
    torch.testing.assert_close(torch.cdist(directions, directions)**2, wanted, atol=1e-5, rtol=1e-5)
    assert plain.shape == (6, 6) and coordinates(torch.randn(6, 1, 4)).shape == (6, 4)


def test_without_truncation_it_is_the_average_weighted_by_usage():
    torch.manual_seed(0)
    for width, rank, n in ((8, 5, 3), (6, 9, 4), (16, 4, 2)):
        like = read(Expert(width, rank))
        states = [{k: torch.randn_like(t, dtype=torch.double) for k, t in like.items()} for _ in range(n)]
        c, t = torch.randint(0, 9, (n,)), torch.randn(3, width)                     # fewer tokens than directions
        for whiten in (None, t.double()):
            found = subspace(states, c, tokens=whiten)
            for name, wanted in usage_weighted(states, c).items():
                torch.testing.assert_close(found[name], wanted, atol=1e-9, rtol=1e-9)


def test_truncated_it_is_a_projection_of_the_average():
    torch.manual_seed(0)
    like, c = read(Expert(8, 5)), torch.tensor([5, 3, 1])
    states = [{k: torch.randn_like(t, dtype=torch.double) for k, t in like.items()} for _ in range(3)]
    t, full = torch.randn(40, 8).double(), usage_weighted(states, c)
    for q in (1, 2, 3):
        merged, whitened = subspace(states, c, rank=q), subspace(states, c, rank=q, tokens=t)
        for name in ('down.weight', 'up.weight'):
            U = torch.linalg.svd(torch.cat([s[name] for s in states], dim=1)).U[:, :q]
            torch.testing.assert_close(merged[name], U @ U.T @ full[name])
            for made in (merged, whitened): assert torch.linalg.matrix_rank(made[name]) == q
        for name in ('down.bias', 'up.bias'): torch.testing.assert_close(merged[name], full[name])


def test_whitened_truncation_changes_answers_less():
    torch.manual_seed(0)
    W, X = torch.randn(6, 8).double(), torch.randn(200, 8).double() * torch.logspace(0, -2, 8)
    def lost(roots):
        U, sigma, (Vt,) = joint_svd([W], roots)
        return ((U[:, :2] * sigma[:2] @ Vt[:2] - W) @ X.T).norm().item()
    best = torch.linalg.svdvals(W @ X.T)[2:].norm().item()                          # no matrix of rank 2 loses less
    assert lost([moment_root(X, 0.)]) < best * (1 + 1e-6) < lost(None)


def test_it_can_combine_during_training():
    torch.manual_seed(0)
    layer_ = MoE('image', 0, 8, Experts(n_experts=4, rank=5))
    layer_.add_task()
    for p in layer_.parameters(): torch.nn.init.normal_(p)
    merge_once(layer_, torch.tensor([4, 9, 1, 7]), Merge(combine=partial(subspace, rank=2)))
    assert torch.linalg.matrix_rank(layer_.experts[2].up.weight) == 2
    assert Merge(combine='moe_merge_nb.rewrites.submoe.subspace').combine.endswith('subspace')


def test_a_shuffled_and_rescaled_copy_merges_without_loss_only_if_it_is_aligned():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=4, rank=5)).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    old, order, c = bank(moe), [3, 0, 4, 1, 2], torch.tensor([.5, 2., 1.5, .7, 1.1])
    a = old.states[0]
    old.states[3] = {
        **a,
        'down.weight': (a['down.weight'] * c[:, None])[order],
        'down.bias': (a['down.bias'] * c)[order],
        'up.weight': (a['up.weight'] / c)[:, order],
    }
    u = torch.randn(60, 4, 8)
    h, nothing = u[:, 0] @ old.gate[0], torch.zeros(2, 60, dtype=torch.long)
    found = Statistics(h, old.select(h), *nothing, peak=torch.zeros(4), tokens=u.flatten(0, 1))
    v = mixture(layer(old), u, 0)
    for options in ({}, dict(cosine=True), dict(adaptive=False), dict(whiten=True)):
        new, = submoe([old], [found], 3, aligned=True, **options)
        to = new.column_to_expert
        assert to[0].equal(to[3]) and to.sum(0).sort().values.tolist() == [1, 1, 2]
        torch.testing.assert_close(mixture(layer(new), u, 0), v, rtol=1e-4, atol=1e-4)
        plain, = submoe([old], [found], 3, **options)
        assert (mixture(layer(plain), u, 0) - v).norm() > .05 * v.norm()


def test_the_full_budget_changes_nothing_and_a_small_one_is_kept():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    learned, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in learned: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    found, u = calibrate(net, tokenizer, learned, images=8), learned[0].test[0][0][None]
    for rule in (submoe, partial(submoe, rank=1), partial(submoe, adaptive=False, whiten=True)):
        torch.testing.assert_close(rewrite(net, found, rule, 5).encode_image(u, 1), net.encode_image(u, 1))
        assert sum(len(m.experts) for m in rewrite(net, found, rule, 2).moes) == 2 * len(net.moes)
    assert all(len(m.experts) == 2 for m in rewrite(net, found, partial(submoe, adaptive=False), 2).moes)


def test_exact_copies_leave_fewer_groups_and_lose_nothing():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=4, rank=5)).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    old = bank(moe)
    old.states[2] = old.states[3] = old.states[0]
    u = torch.randn(60, 4, 8)
    h, nothing = u[:, 0] @ old.gate[0], torch.zeros(2, 60, dtype=torch.long)
    found = Statistics(h, old.select(h), *nothing, peak=torch.zeros(4), tokens=u.flatten(0, 1))
    for budget in (2, 3):
        new, = submoe([old], [found], budget)
        assert len(new.states) <= budget
        torch.testing.assert_close(mixture(layer(new), u, 0), mixture(layer(old), u, 0), rtol=1e-4, atol=1e-4)
