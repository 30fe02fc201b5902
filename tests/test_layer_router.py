import math
import pytest, torch
from moe_merge_nb.layer.router import *


def test_gates_sum_to_one_and_k_are_open():
    g = top_k_gates(torch.randn(50, 7), k=3)
    torch.testing.assert_close(g.sum(-1), torch.ones(50))
    assert ((g > 0).sum(-1) == 3).all()


def test_top_k_softmax_by_hand():
    g = top_k_gates(torch.tensor([[0., math.log(3), -5.]]), k=2)
    torch.testing.assert_close(g, torch.tensor([[0.25, 0.75, 0.]]))


def test_ties_go_to_the_lowest_index():
    assert top_k_gates(torch.zeros(1, 22), k=2)[0].nonzero().flatten().tolist() == [0, 1]


def test_an_impossible_k_is_refused_with_its_limit():
    with pytest.raises(ValueError, match='top_k is 5, but there are 4'): top_k_gates(torch.zeros(1, 4), k=5)


def test_top_p_opens_more_gates_for_flatter_scores():
    h = torch.tensor([[3., 1., 0., -1.]])
    opened = [(top_p_gates(h / t, 0.6) > 0).sum().item() for t in (0.5, 1, 2, 8)]
    assert opened == sorted(opened) and opened[0] == 1 and opened[-1] > 2
    assert (top_p_gates(h, 0.) > 0).sum() == 1 and (top_p_gates(h, 1.) > 0).all()
    rounded = torch.tensor([[16., -1., -1.]])               # the mass of the better ones is rounded to more than 1
    assert (top_p_gates(rounded, 1.) > 0).all()


def test_top_p_is_strict_for_uniform_scores():
    assert (top_p_gates(torch.zeros(1, 10), 0.4) > 0).sum() == 5
