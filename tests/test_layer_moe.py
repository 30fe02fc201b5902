import pytest, torch
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.moe import *


def test_permuting_experts_with_their_router_columns_changes_nothing():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(5, 3)).eval(); moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    x = torch.randn(6, 4, 8); y = mixture(moe, x, 0)
    moe.experts = torch.nn.ModuleList(moe.experts[i] for i in (3, 1, 4, 0, 2))
    moe.routers[0].gate.data = moe.routers[0].gate.data[:, [3, 1, 4, 0, 2]]
    torch.testing.assert_close(mixture(moe, x, 0), y)


def test_a_layer_of_other_kinds_begins_as_nothing_too_and_trains():
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(4, 3, expert='norm', router='mlp', gate='top_p'))
    moe.add_task()
    x = torch.randn(6, 5, 8)
    y = mixture(moe, x, 0)
    assert not y.any()
    y.sum().backward()
    assert sum(e.up.weight.grad is not None for e in moe.experts) >= 1
