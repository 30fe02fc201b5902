from dataclasses import replace
from functools import partial
from math import comb
import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import Expert, read
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.rewrites.bank import expert_gates
from moe_merge_nb.rewrites.bank import bank, banks, close, layer, n_expert_parameters, with_banks
from moe_merge_nb.rewrites.group import average, rewrite
from moe_merge_nb.rewrites.split import *
from moe_merge_nb.rewrites.statistics import calibrate, outputs
from moe_merge_nb.layer.router import top_k_gates, top_p_gates
from moe_merge_nb.streams.tasks import toy_stream


def test_the_sum_of_the_parts_is_the_expert():
    torch.manual_seed(0)
    state = {name: torch.randn_like(t).double() for name, t in read(Expert(6, 12)).items()}
    x = torch.randn(50, 6).double()
    y = outputs([state], x, .1)[0]
    far = lambda parts: (outputs(parts, x, .1).sum(0) - y).norm()
    for m in (1, 2, 3, 4, 6, 12):
        found = split_neurons(state, m)
        assert len(found) == m and all(len(p['down.bias']) == 12 // m for p in found)
        assert far(found) < 1e-14 * y.norm()
        whole_bias = [{**p, 'up.bias': state['up.bias']} for p in found]
        assert m == 1 or far(whole_bias) > .1 * y.norm()  # the bias has to be shared
    for m in (0, 5, 24, -2, 2.):
        with pytest.raises(ValueError, match='divisor of 12'): split_neurons(state, m)


def test_a_union_changes_nothing_whatever_the_gate():
    torch.manual_seed(0)
    for gate in (partial(top_k_gates, k=3), partial(top_p_gates, p=.6)):
        moe = MoE('image', 0, 8, Experts(n_experts=5, rank=12, gate=gate)).eval()
        moe.add_task()
        for p in moe.parameters(): torch.nn.init.normal_(p)
        x, old = torch.randn(30, 4, 8), bank(moe)
        y = mixture(moe, x, 0)
        for m in (1, 2, 3, 12):
            assert (mixture(layer(union_of_experts([old], m)[0]), x, 0) - y).norm() < 1e-6 * y.norm()
        always = replace(close(old, [1]), always_on=torch.tensor([0., .5, 0., 2.]))
        same = mixture(layer(union_of_experts([always], 4)[0]), x, 0)
        assert (same - mixture(layer(always), x, 0)).norm() < 1e-6 * y.norm()


def test_a_split_changes_no_answer_of_either_tower():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    net = AdaptedCLIP(clip, n_experts=5, rank=12, top_k=2).eval()
    for _ in range(2): net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    u = torch.randn(6, 3, 32, 32)
    tokens = tokenizer(['a photo of a cat', 'a photo of a dog', 'a drawing of a red square'])
    encoders = lambda n: [n.encode_image(u, 1), n.encode_text(tokens, 1), n.encode_prompts(tokens, 1)]
    plain = [net.encode_image(u), net.encode_text(tokens), net.encode_text(tokens)]
    biases = sum(5 * moe.width for moe in net.moes)                                             # of the output
    with torch.no_grad():
        before = encoders(net)
        for rule in (union_of_experts, fine_grained):
            for m in (3, 4):
                new = with_banks(net, rule(banks(net), m))
                assert n_expert_parameters(banks(new)) == n_expert_parameters(banks(net)) + (m - 1) * biases
                for y, now, none in zip(before, encoders(new), plain):
                    assert (now - y).norm() < 1e-6 * y.norm() and (y - none).norm() > .01 * y.norm()


def test_a_bank_that_was_rewritten_before_can_be_split():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=6, rank=4)).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    x, b, P = torch.randn(30, 4, 8), bank(moe), torch.zeros(6, 3)
    P[[0, 1, 2, 4], [0, 0, 1, 2]] = torch.tensor([1., 1., .5, 2.])                              # bound, closed, scaled
    old = replace(b, states=b.states[:3], column_to_expert=P, always_on=torch.tensor([.3, 0., 0.]))
    y = mixture(layer(old), x, 0)
    for rule in (union_of_experts, fine_grained):
        twice = rule(rule([old], 2), 2)[0]
        assert len(twice.states) == 12 and (mixture(layer(twice), x, 0) - y).norm() < 1e-6 * y.norm()


def test_other_gates_and_impossible_numbers_are_refused():
    moe = MoE('text', 3, 8, Experts(n_experts=6, rank=4, gate=top_p_gates))
    moe.add_task()
    with pytest.raises(ValueError, match='text block 3.*union_of_experts'): fine_grained([bank(moe)], 2)
    moe.gate = top_k_gates
    for n_shared in (4, -1, 1.):
        with pytest.raises(ValueError, match=r'choose 0 ... 3'): fine_grained([bank(moe)], 2, n_shared)
    with pytest.raises(ValueError, match='divisor of 4'): fine_grained([bank(moe)], 3)


def test_a_shared_part_learns_from_every_sequence():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=6, rank=4))
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    b = fine_grained([bank(moe)], 2, n_shared=2, counts=[torch.tensor([0, 1, 0, 9, 0, 0])])[0]
    assert b.always_on.nonzero().flatten().tolist() == [6, 7] and b.select.keywords == {'k': 2}
    net, x, learns = layer(b), torch.randn(20, 4, 8), torch.zeros(20, 12)
    for e in net.experts.requires_grad_(True): e.requires_grad_(True)
    def size(grad): return torch.tensor(0.) if grad is None else grad.norm()
    for n in range(20):
        net.zero_grad()
        mixture(net, x[n:n+1], 0).square().sum().backward()
        learns[n] = torch.stack([size(e.up.bias.grad) for e in net.experts])
    assert (learns[:, 6:8] > 0).all() and (learns.gt(0).sum(1) == 4).all() and not (learns[:, :6] > 0).all(0).any()
    logits = torch.randn(50, 12).masked_fill((b.column_to_expert == 0).all(1), -torch.inf)
    gates = expert_gates(net.gate(logits), b.column_to_expert, b.always_on)
    torch.testing.assert_close(gates.sum(1), torch.full((50,), 2.))                             # mean weight: 1 / k
    assert ((gates > 0).sum(1) == 4).all()


def test_a_bank_grown_from_one_expert_computes_what_it_did():
    torch.manual_seed(0)
    net = AdaptedCLIP(load_clip(pretrained='random')[0], n_experts=1, rank=6, top_k=1).eval()
    for _ in range(2): net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    u, tokens = torch.randn(6, 3, 32, 32), torch.randint(1, 90, (6, 20))
    encoders = lambda net, task: (net.encode_image(u, task), net.encode_text(tokens, task))
    with torch.no_grad():
        for n, m in ((16, 2), (3, 3), (2, 6)):
            new = with_banks(net, from_dense(banks(net), n, m, seed=n))
            assert len(new.moes[0].experts) == n * m
            for task in (0, 1):
                for y, now in zip(encoders(net, task), encoders(new, task)):
                    assert (now - y).norm() < 1e-6 * y.norm()
            assert (net.encode_image(u) - net.encode_image(u, 0)).norm() > .01 * net.encode_image(u).norm()
        b, x = from_dense(banks(net), 4, 3)[0], torch.randn(200, 1, net.moes[0].width)
        gates = expert_gates(b.select(x[:, 0] @ b.gate[0]), b.column_to_expert, b.always_on)
    assert ((gates > 0).sum(1) == 3).all()                                                      # all parts of one copy,
    assert ((gates > 0).unflatten(1, (4, 3)).sum(-1) % 3 == 0).all()
    assert len(gates.argmax(1).unique()) == 4                                                   # and each is somebody's
    torch.testing.assert_close(gates[gates > 0], torch.ones(600))


def test_all_experts_merged_into_one_can_be_grown_again_and_several_cannot():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=1), AdaptedCLIP(clip, n_experts=3, rank=4).eval()
    net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    one, x = rewrite(net, calibrate(net, tokenizer, stream, images=8), average, 1), torch.randn(4, 3, 32, 32)
    y, now = one.encode_image(x, 0), with_banks(one, from_dense(banks(one), 4, 2)).encode_image(x, 0)
    assert (now - y).norm() < 1e-6 * y.norm()
    with pytest.raises(ValueError, match='3 experts: merge'): from_dense(banks(net))
    twice = [replace(b, always_on=b.always_on + 1) for b in banks(one)]
    with pytest.raises(ValueError, match='weight 1'): from_dense(twice)
    with pytest.raises(ValueError, match='1 copy'): from_dense(banks(one), 0)


def test_a_row_selects_k_columns_or_a_column_selects_n_rows():
    torch.manual_seed(0)
    logits = torch.randn(40, 12)
    for n in (1, 5, 40):
        assert (expert_choice(logits, n).sum(0) == n).all()
        assert (unweighted(logits, min(n, 12)).sum(1) == min(n, 12)).all()
    assert expert_choice(logits, 5).sum(1).unique().numel() > 1                                 # some rows get more
    one = expert_choice(logits, 5)[:20] - expert_choice(logits[:20], 5)
    assert one.any()  # it depends on the batch
    assert not expert_choice(logits.masked_fill(torch.arange(12) == 3, -torch.inf), 5)[:, 3].any()
    with pytest.raises(ValueError, match='choose 1 ... 40'): expert_choice(logits, 41)


def test_all_parts_of_one_expert_without_weights_are_that_expert_but_the_router_learns_nothing():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=5, rank=6, gate=partial(top_k_gates, k=1))).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    x, b = torch.randn(30, 4, 8), bank(moe)
    y = mixture(moe, x, 0)
    assert (mixture(layer(select_parts([b], 3)[0]), x, 0) - y).norm() < 1e-6 * y.norm()
    assert (mixture(layer(select_parts([b], 3, 2)[0]), x, 0) - y).norm() > .1 * y.norm()
    two = replace(b, select=partial(top_k_gates, k=2))  # two experts: their mean
    best = (x[:, 0] @ b.gate[0]).topk(2).indices
    Y = outputs(b.states, x.flatten(0, 1), b.scale).unflatten(1, (30, 4))
    mean = torch.stack([Y[best[i], i].mean(0) for i in range(30)])
    torch.testing.assert_close(mixture(layer(select_parts([two], 2)[0]), x, 0), mean)
    learns = {}
    for name, fine in (('weights', fine_grained([two], 2)[0]), ('none', select_parts([two], 2)[0])):
        net = layer(fine).requires_grad_(True)
        mixture(net, x, 0).square().sum().backward()
        learns[name] = net.routers[0].gate.grad
    assert learns['weights'].norm() > 0 and learns['none'] is None
    with pytest.raises(ValueError, match='choose 1 ... 4'): select_parts([two], 2, 5)


def test_co_selection_is_symmetric_with_usage_on_its_diagonal():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=4).eval()
    for _ in stream: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    split = with_banks(net, fine_grained(banks(net), 2))
    old, new = (calibrate(n, tokenizer, stream, images=8) for n in (net, split))
    for a, b in zip(old, new):
        T = b.together
        assert torch.equal(T, T.T) and torch.equal(T.diag(), b.counts) and T.shape == (10, 10)
        assert torch.equal(T, a.together.repeat_interleave(2, 0).repeat_interleave(2, 1))       # parts stay together
        assert T.sum() == 4 * b.counts.sum()  # every sequence selects 4


def test_the_balance_loss_is_alpha_at_balance_and_pushes_overused_columns_down():
    equal = lambda loss, wanted: torch.testing.assert_close(loss, torch.tensor(wanted))
    even = 3 * torch.eye(6) + 2 * torch.eye(6).roll(1, 1)                                       # each is first once
    equal(balance_loss(top_k_gates(even), even.softmax(-1), .3), .3)
    torch.manual_seed(0)
    for seed in range(20):
        h = torch.randn(200, 6) + torch.randn(6).sort().values
        gates, p = top_k_gates(h), h.softmax(-1)
        n = (gates > 0).sum(0)
        if (n.argsort() == p.mean(0).argsort()).all(): assert balance_loss(gates, p, .3) > .3
    one = torch.full((50, 6), -20.)
    one[:, 2] = 20.
    equal(balance_loss(top_k_gates(one, 1), one.softmax(-1), .3), 6 * .3)                       # all in one column
    s = torch.tensor([[.51, .49]] * 3 + [[0., 1.]])
    equal(balance_loss(top_k_gates(s, 1), s, 1.), 1.5 * .3825 + .5 * .6175)  # unbalanced, below alpha
    h = (torch.randn(200, 6) + torch.tensor([2., 0, 0, 0, 0, 0])).requires_grad_(True)
    balance_loss(top_k_gates(h), h.softmax(-1)).backward()
    assert h.grad[:, 0].sum() > 0 > h.grad[:, 1:].sum()  # the overused one goes down
