import pytest, torch
from torch.nn import functional as F
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.streams.tasks import prompts, toy_stream
from moe_merge_nb.rewrites.bank import banks, with_banks
from moe_merge_nb.rewrites.group import rewrite
from moe_merge_nb.rewrites.statistics import calibrate
from moe_merge_nb.rewrites.super_experts import *


def test_an_expert_with_a_hundredfold_output_is_the_only_one_found():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    small, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in small: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    for block in (0, 5):
        e = int(calibrate(net, tokenizer, small, images=8)[block].counts.argmax())
        net.moes[block].experts[e].up.weight.data *= 100
        assert super_experts(calibrate(net, tokenizer, small, images=8)) == [(block, e)]
        net.moes[block].experts[e].up.weight.data /= 100


def test_both_conditions_count():
    from moe_merge_nb.rewrites.statistics import Statistics
    def with_peaks(rows): return [Statistics(*[torch.zeros(1)]*4, torch.tensor(r), torch.zeros(1)) for r in rows]
    many = [[1.]*100 for _ in range(6)]
    many[2][7], many[4][9], many[5][0] = 90., 50., 8.
    assert super_experts(with_peaks(many)) == [(2, 7), (4, 9)]  # 8 is above the percentile, not 90/10
    many[5][0] = 10.
    assert super_experts(with_peaks(many)) == [(2, 7), (4, 9), (5, 0)]
    assert super_experts(with_peaks([[3.]*4, [3.]*4])) == []                        # nobody is above the others
    assert len(super_experts(with_peaks(torch.rand(12, 22).tolist()))) == 2         # of 264, however flat


def test_a_pruned_expert_gets_no_gate_any_more():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    small, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in small: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    e = int(calibrate(net, tokenizer, small, images=8)[3].counts.argmax())
    net.moes[3].experts[e].up.weight.data *= 100
    before = calibrate(net, tokenizer, small, images=8)
    pruned = with_banks(net, prune(banks(net), super_experts(before)))
    after = calibrate(pruned, tokenizer, small, images=8)
    assert before[3].mass[e] > 0 and after[3].mass[e] == 0
    torch.testing.assert_close(after[3].mass.sum(), before[3].mass.sum())           # others took over
    assert [len(b.states) for b in prune(banks(net), [(3, e), (0, 1), (0, 2)])] == [3, 5, 5, 4, 5, 5, 5]
    with pytest.raises(ValueError, match='closed'): prune(banks(net), [(1, e) for e in range(5)])


def test_the_budget_is_kept_over_all_blocks_and_every_block_keeps_one():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    small, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in small: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    before, u = calibrate(net, tokenizer, small, images=8), small[0].test[0][0][None]
    for rule in (prune_super, prune_random):
        assert torch.equal(rewrite(net, before, rule, 5).encode_image(u, 1), net.encode_image(u, 1))
        for budget in (1, 2, 4):
            left = [len(m.experts) for m in rewrite(net, before, rule, budget).moes]
            assert sum(left) == budget * len(left) and min(left) >= 1
    assert leaving_one([(0, 1), (0, 0), (1, 0), (0, 2), (1, 1)], 3) == [(0, 1), (0, 0), (1, 0)]
    assert leaving_one([(0, 1), (0, 0), (1, 0), (1, 1)], 2) == [(0, 1), (1, 0)]


def test_chance_takes_selected_experts_first():
    from moe_merge_nb.rewrites.statistics import Statistics
    rows = torch.tensor([[.5, 0., .5, 0.], [0., 0., 0., 1.]])
    s = [Statistics(torch.zeros(1, 4), g[None], *[torch.zeros(1)]*2, peak=g, tokens=torch.zeros(1)) for g in rows]
    for seed in range(5):
        order = by_chance(s, seed)
        assert set(order[:3]) == {(0, 0), (0, 2), (1, 3)} and len(set(order)) == 8 and order == by_chance(s, seed)
    assert len({tuple(by_chance(s, seed)) for seed in range(5)}) > 1
