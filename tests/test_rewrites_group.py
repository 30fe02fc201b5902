from functools import partial
import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.merge.combine import mean
from moe_merge_nb.rewrites.bank import Bank, bank, banks, layer, n_expert_parameters
from moe_merge_nb.rewrites.group import *
from moe_merge_nb.rewrites.statistics import Statistics, calibrate
from moe_merge_nb.streams.tasks import toy_stream


def test_a_shuffled_and_rescaled_copy_merges_without_loss_only_if_it_is_aligned():
    from moe_merge_nb.layer.kinds import Experts
    from moe_merge_nb.layer.moe import MoE, mixture
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=3, rank=5)).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    old, order, c = bank(moe), [3, 0, 4, 1, 2], torch.tensor([.5, 2., 1.5, .7, 1.1])
    a = old.states[0]
    old.states[2] = {
        **a,
        'down.weight': (a['down.weight'] * c[:, None])[order],
        'down.bias': (a['down.bias'] * c)[order],
        'up.weight': (a['up.weight'] / c)[:, order],
    }
    x, n = torch.randn(30, 4, 8), torch.tensor([9, 1, 5])
    y = mixture(layer(old), x, 0)
    answer = lambda aligned: mixture(layer(merge_groups(old, n, [[0, 2], [1]], mean, aligned)), x, 0)
    torch.testing.assert_close(answer(True), y, rtol=1e-4, atol=1e-5)
    assert (answer(False) - y).norm() > .1 * y.norm()


def test_the_full_budget_changes_nothing_and_a_small_one_is_kept():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in stream: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    found, x = calibrate(net, tokenizer, stream, images=8), stream[0].test[0][0][None]
    for rule in (average, drop_least_used, drop_random):
        torch.testing.assert_close(rewrite(net, found, rule, 5).encode_image(x, 1), net.encode_image(x, 1))
        assert sum(len(m.experts) for m in rewrite(net, found, rule, 2).moes) == 2 * len(net.moes)
    with pytest.raises(ValueError, match='score'): rewrite(net, found, partial(average, score='size'), 2)
    for budget in (0, 6):
        with pytest.raises(ValueError, match='choose 1 ... 5'): rewrite(net, found, average, budget)
    with pytest.raises(ValueError, match='before'): rewrite(rewrite(net, found, average, 2), found, average, 2)
