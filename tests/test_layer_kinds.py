import pytest, torch
from torch import nn
from moe_merge_nb.layer.experts import *
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.tried import try_out


def test_a_part_of_the_wrong_shape_is_found_before_a_run():
    for change, message in (
        (dict(gate=lambda h: h.sum(1)), 'experts.gate=.* must return a tensor of shape .2, 4., got .2,.'),
        (dict(expert=lambda width: nn.Linear(width, 3)), 'experts.expert=.* must return a tensor of shape .2, 3, 8.'),
        (dict(router=lambda width: nn.Linear(width, 4)), 'experts.router=.* failed with TypeError'),
        (dict(expert=lambda d: nn.Linear(d, d)), 'experts.expert=.* cannot be made'),
        (dict(mix=lambda x, route, experts: x * torch.nan), 'experts.mix=.* returned NaN'),
    ):
        with pytest.raises(ValueError, match=message): try_out(Experts(n_experts=4, rank=2, **change))
