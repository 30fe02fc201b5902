import pytest, torch
from dataclasses import replace
from functools import partial
from torch.nn import functional as F
from moe_merge_nb.layer.experts import Expert, read, write
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.layer.experts import balance, neurons
from moe_merge_nb.merge.combine import mean
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.rewrites.bank import bank, layer
from moe_merge_nb.rewrites.group import average, drop_least_used, merge_groups
from moe_merge_nb.rewrites.statistics import Statistics, outputs
from moe_merge_nb.rewrites.dern import *


def test_a_shuffled_and_rescaled_copy_goes_where_it_came_from():
    torch.manual_seed(0)
    def some(width=8, rank=5):
        e = Expert(width, rank)
        for p in e.parameters(): torch.nn.init.normal_(p)
        return read(e)
    a, other, order, c = some(), some(), [3, 0, 4, 1, 2], torch.tensor([.5, 2., 1.5, .7, 1.1])
    twin = {
        **a,
        'down.weight': (a['down.weight'] * c[:, None])[order],
        'down.bias': (a['down.bias'] * c)[order],
        'up.weight': (a['up.weight'] / c)[:, order],
    }
    kept = [balance(other), balance(a)]
    assert send(balance(twin), kept, threshold=.999).tolist() == [1]*5
    assert send(balance(some()), kept, threshold=.999).tolist() == [-1]*5
    mixed = {name: torch.cat([a[name][:2], other[name][2:]]) for name in ('down.weight', 'down.bias')}
    mixed['up.weight'] = torch.cat([a['up.weight'][:, :2], other['up.weight'][:, 2:]], 1)
    mixed['up.bias'] = a['up.bias']
    assert send(balance(mixed), kept).tolist() == [1, 1, 0, 0, 0]


def test_k_means_never_gets_worse_and_finds_the_best_partition_of_separated_rows():
    from itertools import product
    torch.manual_seed(0)
    Z, w = torch.randn(40, 6).double(), torch.rand(40).double()
    def agreement(steps):
        C, of = k_means(Z, w, Z[:5], steps)
        return (w * F.cosine_similarity(Z, C[of])).sum().item()
    seen = [agreement(n) for n in range(1, 12)]
    assert all(b >= a - 1e-12 for a, b in zip(seen, seen[1:])) and seen[-1] > seen[0] + .1
    cloud = lambda axis: torch.eye(3)[[axis]*4] + .1*torch.randn(4, 3)
    Z, w = torch.cat([cloud(0), cloud(1)]) * (.5 + torch.rand(8, 1)), torch.rand(8)
    def length(of, j):
        "Of the weighted sum of the directions in one part."
        part = [i for i in range(8) if of[i] == j]
        return (w[part, None] * F.normalize(Z[part], dim=1)).sum(0).norm()
    best = max(product((0, 1), repeat=8), key=lambda of: length(of, 0) + length(of, 1))
    found = k_means(Z, w, Z[[0, 7]])[1].tolist()
    assert found in ([*best], [1 - j for j in best])


def test_dropping_a_copy_is_lossless_if_its_gate_is_handed_on():
    torch.manual_seed(0)
    net = MoE('image', 0, 8, Experts(n_experts=4, rank=5)).eval()
    net.add_task()
    for p in net.parameters(): torch.nn.init.normal_(p)
    found, order, c = bank(net), [3, 0, 4, 1, 2], torch.tensor([.5, 2., 1.5, .7, 1.1])
    a = found.states[1]
    found.states[3] = {
        **a,
        'down.weight': (a['down.weight'] * c[:, None])[order],
        'down.bias': (a['down.bias'] * c)[order],
        'up.weight': (a['up.weight'] / c)[:, order],
    }
    u, mass = torch.randn(50, 3, 8), torch.tensor([[.3, .3, .3, .1]])
    s = Statistics(mass, mass, *torch.zeros(2, 1).long(), peak=torch.zeros(4), tokens=u.flatten(0, 1))
    y, new = mixture(layer(found), u, 0), {router: dern([found], [s], 3, router=router)[0] for router in ROUTER}
    answer = {router: mixture(layer(each), u, 0) for router, each in new.items()}
    for router in ('share', 'bind'): torch.testing.assert_close(answer[router], y, rtol=1e-4, atol=1e-4)
    for router in ('add', 'close'): assert (answer[router] - y).norm() > .05 * y.norm()
    for each in new.values():                                                       # survivors compute the same
        for e in range(3): torch.testing.assert_close(balance(each.states[e]), balance(found.states[e]))


def test_no_gate_is_lost_unless_neurons_are_discarded():
    torch.manual_seed(0)
    net = MoE('text', 1, 8, Experts(n_experts=6, rank=4)).eval()
    for _ in range(2): net.add_task()
    for p in net.parameters(): torch.nn.init.normal_(p)
    found, kept = bank(net), [1, 4]
    to = recombined(found, kept).column_to_expert
    torch.testing.assert_close(to.sum(1), torch.ones(6))
    assert to[kept].tolist() == [[1, 0], [0, 1]] and ((to * 4).round() == to * 4).all()
    survives, added = torch.eye(6)[kept].sum(0), found.gate.index_copy(2, torch.tensor(kept), found.gate @ to)
    torch.testing.assert_close(recombined(found, kept, router='add').gate, torch.where(survives > 0, added, found.gate))
    assert (recombined(found, kept, threshold=.999).column_to_expert.sum(1) == survives).all()
    assert (recombined(found, kept, router='bind').column_to_expert.sum(1) == 1).all()


def test_the_full_budget_changes_nothing_and_a_small_one_is_kept_at_the_same_width():
    torch.manual_seed(0)
    nets = [MoE('image', i, 8, Experts(n_experts=5, rank=4)).eval() for i in range(3)]
    for net in nets:
        net.add_task()
        for p in net.parameters(): torch.nn.init.normal_(p)
    found, u = [bank(net) for net in nets], torch.randn(20, 3, 8)
    gates = [torch.rand(30, 5) for _ in nets]
    rest = dict(task=torch.zeros(30).long(), label=torch.zeros(30).long(), peak=torch.zeros(5), tokens=u.flatten(0, 1))
    s = [Statistics(g, g / g.sum(1, keepdim=True), **rest) for g in gates]
    for was, same in zip(found, dern(found, s, 5)):
        assert torch.equal(mixture(layer(same), u, 0), mixture(layer(was), u, 0))
    for score in ('mass', 'counts'):
        new = dern(found, s, 2, score=score)
        assert sum(len(b.states) for b in new) == 6
        tensors = [(name, t) for b in new for state in b.states for name, t in state.items()]
        assert all(t.shape == found[0].states[0][name].shape and t.isfinite().all() for name, t in tensors)
    for each, was in zip(dern(found, s, 2, received=0), found):  # gates are handed on, survivors stay
        now, then = outputs(each.states, u.flatten(0, 1)), outputs(was.states, u.flatten(0, 1))
        assert all(any(torch.allclose(y, z, atol=1e-4) for z in then) for y in now)
    for wrong in (dict(score='usage'), dict(router='open'), dict(received=-1)):
        with pytest.raises(ValueError, match='choose'): dern(found, s, 2, **wrong)


def test_a_shuffled_and_rescaled_copy_recombines_without_loss():
    torch.manual_seed(0)
    mine, merged = Expert(8, 5), Expert(8, 5)
    for p in mine.parameters(): torch.nn.init.normal_(p)
    a, order, c = read(mine), [3, 0, 4, 1, 2], torch.tensor([.5, 2., 1.5, .7, 1.1])
    twin = {
        **a,
        'down.weight': (a['down.weight'] * c[:, None])[order],
        'down.bias': (a['down.bias'] * c)[order],
        'up.weight': (a['up.weight'] / c)[:, order],
    }
    u = torch.randn(50, 8)
    y = mine.eval()(u)
    merged.eval()
    for counts in (torch.tensor([5, 3]), torch.tensor([0, 0]), torch.tensor([2, 0])):
        write(merged, recombine([a, twin], counts))
        torch.testing.assert_close(merged(u), y, rtol=1e-4, atol=1e-4)
    write(merged, mean([a, twin]))
    assert (merged(u) - y).norm() > .3 * y.norm()


def test_it_works_after_training_and_in_training():
    torch.manual_seed(0)
    net = MoE('image', 0, 8, Experts(n_experts=4, rank=5))
    net.add_task()
    for p in net.parameters(): torch.nn.init.normal_(p)
    n = torch.tensor([9, 5, 3, 0])
    expected = recombine([read(net.experts[0]), read(net.experts[1])], n[:2])
    new = merge_groups(bank(net), n, [[0, 1], [2, 3]], recombine)
    event = merge_once(net, n, Merge(combine=recombine))
    assert event['target'] == 3 and Merge(combine='moe_merge_nb.rewrites.dern.recombine').combine
    for name, t in expected.items():
        torch.testing.assert_close(read(net.experts[3])[name], t)
        torch.testing.assert_close(new.states[0][name], t)
