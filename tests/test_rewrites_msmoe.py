from itertools import combinations
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import Expert, read
from moe_merge_nb.layer.experts import balance
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.rewrites.bank import bank, banks, layer, n_expert_parameters
from moe_merge_nb.rewrites.group import average, rewrite
from moe_merge_nb.rewrites.msmoe import *
from moe_merge_nb.rewrites.statistics import Statistics, calibrate, outputs
from moe_merge_nb.streams.tasks import toy_stream
import pytest, torch


def test_a_shuffled_and_rescaled_copy_merges_without_loss_by_the_rule_and_not_by_the_mean():
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
    old.gate[0, :, 3] = old.gate[0, :, 0] / 2
    u = torch.randn(60, 4, 8) - .3 * old.gate[0, :, 0]
    logits, nothing = u[:, 0] @ old.gate[0], torch.zeros(2, 60, dtype=torch.long)
    found = Statistics(logits, old.select(logits), *nothing, peak=torch.zeros(4), tokens=u.flatten(0, 1))
    assert 0 < found.counts[0] == found.counts.min()
    v = mixture(layer(old), u, 0)
    def loss(rule, **options):
        [new] = rule([old], [found], 3, **options)
        return (mixture(layer(new), u, 0) - v).norm() / v.norm()
    assert loss(msmoe) < 1e-5 and loss(msmoe, similarity='outputs') < 1e-5
    assert loss(msmoe, aligned=False) > .05 and loss(average) > .05
    S = {name: f(old, found)[3] for name, f in SIMILARITY.items()}
    for name in ('router_logits', 'router_weight', 'outputs'): assert abs(S[name][0] - 1) < 1e-5
    assert S['weight'][0] < .9


def test_an_unused_member_leaves_the_leader_as_it_is():
    torch.manual_seed(0)
    moe = MoE('text', 1, 8, Experts(n_experts=3, rank=4))
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    gates = torch.tensor([[1., 0, 0], [1, 0, 0], [0, 1, 0]])
    logits, nothing = torch.tensor([[2., 0, 1], [3, 0, 2], [0, 1, 0]]), torch.zeros(2, 3, dtype=torch.long)
    found = Statistics(logits, gates, *nothing, peak=torch.zeros(3), tokens=torch.randn(5, 8))
    new, = msmoe([bank(moe)], [found], 2)
    t = torch.randn(50, 8)
    torch.testing.assert_close(outputs(new.states[:1], t), outputs(bank(moe).states[:1], t))
    assert new.column_to_expert.tolist() == [[1, 0], [0, 1], [1, 0]] and torch.equal(new.gate, bank(moe).gate)


def test_the_full_budget_changes_nothing_and_a_small_one_is_kept():
    from functools import partial
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    learned, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in learned: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    found, u = calibrate(net, tokenizer, learned, images=8), learned[0].test[0][0][None]
    for rule in (*(partial(msmoe, similarity=name) for name in SIMILARITY), partial(mcsmoe, keep=1.)):
        full = rewrite(net, found, rule, 5).encode_image(u, 1)
        torch.testing.assert_close(full, net.encode_image(u, 1), rtol=1e-4, atol=1e-5)
        assert sum(len(m.experts) for m in rewrite(net, found, rule, 2).moes) == 2 * len(net.moes)
    with pytest.raises(ValueError, match='router_logits, router_weight'):
        rewrite(net, found, partial(msmoe, similarity='taste'), 2)


def test_no_other_rows_give_a_smaller_error():
    torch.manual_seed(0)
    S, h = torch.randn(6, 5), torch.randn(40, 5).relu()
    def lost(K): return ((S - K) @ h.T).square().sum()
    best = lost(keep_rows(S, row_importance(S, h), .5))
    for rows in combinations(range(6), 3):
        K = torch.zeros(6, 5)
        K[list(rows)] = S[list(rows)]
        assert best <= lost(K) + 1e-4


def test_what_is_kept_is_exact():
    torch.manual_seed(0)
    W = torch.randn(7, 9)
    for ratio in (0., .15, .5, 1., 3.):
        L, R = low_rank(W, ratio)
        S = W - L @ R
        torch.testing.assert_close(L @ R + keep_rows(S, row_importance(S), 1.), W)
        assert torch.linalg.matrix_rank(L @ R) == L.shape[1] == n_ranks(7, 9, ratio)
        if 0 < ratio < 1: assert L.numel() + R.numel() < ratio * 63 + 16
    torch.testing.assert_close(torch.mm(*low_rank(W, 3.)), W)
    K = L @ R + keep_rows(S, row_importance(S), .4)
    assert int((K - W).abs().amax(1).lt(1e-5).sum()) >= 3
