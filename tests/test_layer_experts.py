import pytest, torch
from moe_merge_nb.layer.experts import *


def test_balancing_and_permuting_change_no_output():
    torch.manual_seed(1)
    e, x = Expert(8, 3).eval(), torch.randn(20, 8)
    for p in e.parameters(): torch.nn.init.normal_(p)
    y = e(x)
    write(e, permuted(balance(read(e)), torch.tensor([2, 0, 1])))
    torch.testing.assert_close(e(x), y)


def test_other_kinds_begin_as_the_zero_function_too_and_have_no_algebra():
    for kind in (GeluExpert, NormExpert):
        e, x = kind(8, 3), torch.randn(4, 5, 8)
        assert torch.equal(e(x), torch.zeros_like(x)) and algebra_of(e) is None
    assert algebra_of(Expert(8, 3)).neurons is neurons


def test_a_normalised_bottleneck_does_not_see_how_strongly_it_reads():
    torch.manual_seed(0)
    e, x = NormExpert(8, 4).eval(), torch.randn(20, 8)
    for p in e.parameters(): torch.nn.init.normal_(p)
    y = e(x)
    for name in ('weight', 'bias'): getattr(e.down, name).data *= 5
    torch.testing.assert_close(e(x), y, rtol=1e-3, atol=1e-3)


def test_shared_init_makes_equal_experts():
    same, different = many(lambda: Expert(8, 2), 3, shared_init=True), many(lambda: Expert(8, 2), 3)
    assert torch.equal(same[0].down.weight, same[2].down.weight)
    assert not torch.equal(different[0].down.weight, different[2].down.weight)
