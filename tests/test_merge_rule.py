import pytest
import torch
from torch import nn
from moe_merge_nb.layer.experts import *
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import *
from moe_merge_nb.merge.combine import COMBINE, mean
from moe_merge_nb.merge.rule import *
def a_layer(n=4, **how):
    "A layer that has learned a task; all its numbers are random."
    moe = MoE('image', 0, 8, Experts(n_experts=n, rank=3, **how))
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    return moe
def same(a, b): return all(torch.equal(a[name], t) for name, t in b.items())


def test_a_rule_that_fails_is_named():
    def broken(states, counts, base): return {n: base[n] for n in base}
    def short(states, counts, base): return {**states[0], 'up.bias': torch.zeros(3)}
    for bad, says in ((broken, 'shared_init'), (lambda *a: None, 'must return'), (short, 'must return')):
        with pytest.raises(ValueError, match=says):
            merge_once(a_layer(), torch.tensor([4, 9, 1, 7]), Merge(combine=bad))


def test_a_merge_writes_the_target_and_nothing_else():
    torch.manual_seed(0)
    moe = a_layer()
    before, gate = [read(e) for e in moe.experts], moe.routers[0].gate.clone()
    event = merge_once(moe, torch.tensor([4, 9, 1, 7]))
    assert event['sources'] == [1, 3] and event['target'] == 2
    for e in (0, 1, 3): assert same(before[e], read(moe.experts[e]))
    torch.testing.assert_close(read(moe.experts[2])['up.weight'], (before[1]['up.weight'] + before[3]['up.weight']) / 2)
    assert torch.equal(gate, moe.routers[0].gate)


def test_frozen_experts_survive_any_number_of_merges():
    torch.manual_seed(0)
    moe = a_layer(6)
    moe.freeze([0, 4])
    before = [read(e) for e in moe.experts]
    for _ in range(20): merge_once(moe, torch.randint(1, 9, (6,)), Merge(align=True, router='zero'))
    for e in (0, 4): assert same(before[e], read(moe.experts[e]))


def test_the_router_column_follows_the_choice():
    for router in ('noisy', 'mlp'):
        for how, wanted in dict(keep=2., mean=2., zero=0.).items():
            moe = a_layer(router=router)
            moe.routers[0].gate.data[:] = torch.arange(4.)
            merge_once(moe, torch.tensor([4, 9, 1, 9]), Merge(router=how))
            assert (moe.routers[0].gate[:, 2] == wanted).all() and (moe.routers[0].gate[:, 3] == 3).all()


def test_merging_commutes_with_permuting_the_experts():
    torch.manual_seed(0)
    counts, p = torch.tensor([4, 9, 1, 7, 3]), [2, 0, 4, 1, 3]
    a, b = a_layer(5), a_layer(5)
    for new, old in enumerate(p): write(b.experts[new], read(a.experts[old]))
    merge_once(a, counts)
    merge_once(b, counts[p])
    for new, old in enumerate(p): assert same(read(b.experts[new]), read(a.experts[old]))


def test_what_a_kind_cannot_do_is_refused_by_name():
    for change, kinds in ((dict(align=True), dict(expert='gelu')), (dict(fit=True), dict(expert='norm'))):
        check_rule(Merge(**change), Experts(rank=2))
        with pytest.raises(ValueError, match='merge.(align|fit) is true with experts.expert=.*no algebra'):
            check_rule(Merge(**change), Experts(rank=2, **kinds))
    with pytest.raises(ValueError, match='merge.router .*no columns'):
        check_rule(Merge(router='mean'), Experts(rank=2, router=lambda width, n_experts: nn.Linear(width, n_experts)))
    with pytest.raises(ValueError, match='ties.*experts.shared_init=true'):
        check_rule(Merge(combine='ties'), Experts(rank=2))
    check_rule(Merge(combine='ties'), Experts(rank=2, shared_init=True))


def test_task_arithmetic_is_one_function():
    def task_arithmetic(states, counts, base, lam=0.5):
        return {n: base[n] + lam * sum(s[n] - base[n] for s in states) for n in base}
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=4, rank=3, shared_init=True))
    moe.add_task()
    for e in moe.experts: e.up.weight.data.normal_()
    wanted = mean([read(moe.experts[1]), read(moe.experts[3])])
    merge_once(moe, torch.tensor([4, 9, 1, 7]), Merge(combine=task_arithmetic))
    torch.testing.assert_close(moe.experts[2].up.weight, wanted['up.weight'])
