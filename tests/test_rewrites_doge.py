import math, time
import pandas as pd
from functools import partial
import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import Expert, read
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.merge.combine import mean
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE
from moe_merge_nb.rewrites.doge import *
from moe_merge_nb.rewrites.group import reduce_by, rewrite
from moe_merge_nb.rewrites.statistics import calibrate
from moe_merge_nb.rewrites.task_vectors import task_vectors
from moe_merge_nb.streams.tasks import toy_stream


def test_the_loss_falls():
    torch.manual_seed(0)
    for shape in ((16, 128), (128, 16), (5, 20)):
        for lam, relative in ((.07, False), (.3, True)):
            T = .1 * torch.randn(3, *shape)
            L = coefficients(T, lam, relative)
            corrections = torch.zeros(shape), correction(T, L, shared_basis(T))
            before, after = [gaps(T, L, d).square().sum() for d in corrections]
            assert after < before and (not relative or after < .8 * before)


def test_plain_gradient_descent_stays_out_of_the_shared_space_and_adam_does_not():
    torch.manual_seed(0)
    T = .1 * torch.randn(2, 16, 40)
    L, Q, D = coefficients(T, .3, True), shared_basis(T), torch.zeros(16, 40)
    for _ in range(20):
        g = gradient(T, L, D)
        D -= .01 * (g - Q @ (Q.T @ g))
    assert (Q.T @ D).norm() < 1e-5 * D.norm()
    assert (Q.T @ correction(T, L, Q)).norm() > 1e-3 * correction(T, L, Q).norm()


def test_doge_needs_a_common_start_and_a_share():
    s = read(Expert(12, 8))
    for f in (doge, doge_relative):
        with pytest.raises(ValueError, match='experts.shared_init=true'): f([s, s], None, None)
        with pytest.raises(ValueError, match='keep is 0'): f([s, s], None, s, keep=0)


def test_doge_merges_during_training_and_reduces_after_it():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=4, rank=6, shared_init=True))
    moe.add_task()
    for p in moe.experts.parameters(): p.data += torch.randn_like(p)
    sources, used = [read(moe.experts[e]) for e in (1, 3)], torch.tensor([4, 9, 1, 7])
    merge_once(moe, used, Merge(combine='moe_merge_nb.rewrites.doge.doge'))
    wanted, merged = doge(sources, used[[1, 3]], read(moe.base)), read(moe.experts[2])
    for n, t in wanted.items(): assert torch.equal(t, merged[n])
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=4, rank=3, shared_init=True).eval()
    for _ in stream: net.add_task()
    found, x = calibrate(net, tokenizer, stream, images=4), stream[0].test[0][0][None]
    rule = partial(reduce_by(doge_relative), steps=10)
    torch.testing.assert_close(rewrite(net, found, rule, 4).encode_image(x, 1), net.encode_image(x, 1))
    assert sum(len(m.experts) for m in rewrite(net, found, rule, 2).moes) == 2 * len(net.moes)


def test_equal_to_a_plain_statement_with_autograd():
    torch.manual_seed(0)
    base, names = read(Expert(24, 12)), ('down.weight', 'up.weight')
    three = [{n: t + .05 * torch.randn_like(t) for n, t in base.items()} for _ in range(3)]
    found = doge(three, None, base, steps=40)
    flat = [torch.cat([(s[n] - base[n]).flatten() for n in names]) for s in three]
    cut = [sorted(v.abs().tolist())[-int(len(v) * .3) - 1] for v in flat]
    for name in names:
        taus = [s[name] - base[name] for s in three]
        lam = [.07 / math.sqrt((t**2).sum()) for t in taus]
        U = torch.cat([torch.linalg.svd(t)[0][:, :4] for t in taus], dim=1)             # 12 // 3 of each
        P = torch.linalg.svd(U)[0][:, :2]                                               # 12 // 6
        P = P @ P.T
        D = torch.zeros_like(taus[0], requires_grad=True)
        adam = torch.optim.Adam([D], lr=1e-4)
        for _ in range(40):
            merged = sum(l * (t + D) for l, t in zip(lam, taus))
            adam.zero_grad()
            sum(((t[r] * (t[r] - merged[r])).sum()**2 for t in taus for r in range(len(t)))).backward()
            D.grad -= P @ D.grad
            adam.step()
        wanted = base[name] + sum(l * (t + D.detach()) * (t.abs() >= c) for l, t, c in zip(lam, taus, cut))
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_equal_to_fusion_bench():
    # a development check: `pip install --no-deps fusion-bench lightning lightning-utilities pytorch-lightning
    # torchmetrics bidict rich`
    theirs = pytest.importorskip('fusion_bench.method.doge_ta.doge_ta')
    from moe_merge_nb.layer.experts import write
    torch.manual_seed(0)
    for rank, n in ((16, 2), (16, 5), (7, 3)):
        base = read(Expert(32, rank))
        several = [{name: t + .02 * torch.randn_like(t) for name, t in base.items()} for _ in range(n)]
        def model(state): # fusion-bench takes the matrices of an 'encoder'
            expert = Expert(32, rank)
            write(expert, state)
            return torch.nn.ModuleDict({'encoder': expert})
        pool = {'_pretrained_': model(base), **{str(i): model(s) for i, s in enumerate(several)}}
        wanted = read(theirs.DOGE_TA_Algorithm(subspace=6, K=30, lamda=.07).run(pool)['encoder'])
        found = doge(several, None, base)
        for name, t in found.items(): torch.testing.assert_close(t, wanted[name], rtol=1e-5, atol=1e-5)
