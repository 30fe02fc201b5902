import pytest, torch
from moe_merge_nb.layer.experts import *
from moe_merge_nb.merge.combine import mean
from moe_merge_nb.merge.align import *
def clothed(state, order, c):
    "The same function: neurons in another `order`, reading `c` times as strongly."
    down, bias, up = state['down.weight'] * c[:, None], state['down.bias'] * c, state['up.weight'] / c
    return permuted({**state, 'down.weight': down, 'down.bias': bias, 'up.weight': up}, order)
def random_state():
    sizes = {'down.weight': (5, 8), 'down.bias': (5,), 'up.weight': (8, 5), 'up.bias': (8,)}
    return {name: torch.randn(size) for name, size in sizes.items()}


def test_an_aligned_copy_merges_without_loss_and_a_plain_one_does_not():
    torch.manual_seed(0)
    expert, merged, x = Expert(8, 5).eval(), Expert(8, 5).eval(), torch.randn(50, 8)
    for p in expert.parameters(): torch.nn.init.normal_(p)
    a, y = read(expert), expert(x)
    b = clothed(a, order=torch.tensor([3, 0, 4, 1, 2]), c=torch.tensor([.5, 2., 1.5, .7, 1.1]))
    write(merged, mean(aligned([a, b])))
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)
    write(merged, mean([a, b]))
    assert (merged(x) - y).norm() > 0.3 * y.norm()


def test_fitting_brings_a_combination_nearer_to_the_mean_of_the_functions():
    torch.manual_seed(0)
    a, b, x, new = random_state(), random_state(), torch.randn(400, 8), torch.randn(400, 8)
    def f(s, x): return (x @ s['down.weight'].T + s['down.bias']).relu() @ s['up.weight'].T + s['up.bias']
    def lacks(s): return (f(s, new) - (f(a, new) + f(b, new))/2).norm()
    m = mean([a, b])
    assert lacks(fit(m, [a, b], x)) < .8 * lacks(m)
    c = {**a, 'up.weight': torch.randn(8, 5), 'up.bias': torch.randn(8)}  # the same neurons: nothing need be missing
    torch.testing.assert_close(f(fit(a, [a, c], x, 1e-9), new), (f(a, new) + f(c, new))/2, rtol=1e-3, atol=1e-3)
