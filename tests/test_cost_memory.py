import torch
from moe_merge_nb.cost.memory import *


def test_a_storage_is_counted_once_and_parameters_never():
    w, x = torch.nn.Parameter(torch.randn(100, 100)), torch.randn(100, 100)
    memory = Memory([w])
    with torch.autograd.graph.saved_tensors_hooks(memory.pack, memory.unpack):
        y = (x @ w).relu()                          # x is saved, and y
        z = y[:50].exp() @ y[50:].T                 # views of y, and one new tensor of half the size
    assert memory.now == 4*100*100*2.5, memory.now
    del y, z
    assert memory.now == 0 and memory.peak == 4*100*100*2.5


def test_frozen_layers_below_keep_nothing():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    x = torch.randn(1000, 64)
    def peak(): return peak_bytes(lambda: layers(x).sum().backward(), layers.parameters(), [x])
    hidden, second = 4*1000*64, 4*(64*64 + 64)
    assert peak() == hidden + second      # the second layer's gradients, while the rectifier's output is kept
    layers[0].requires_grad_(False)
    assert peak() in (hidden, hidden + second)
    assert peak_bytes(lambda: None, layers.parameters()) == 0 and all(p.grad is None for p in layers.parameters())


def test_the_peak_of_a_chain_grows_with_every_layer_that_is_kept():
    x, w = torch.randn(10, 10), torch.zeros(1, requires_grad=True)
    def chain(n):
        y = x + w
        for _ in range(n): y = y.exp()
        y.sum().backward()
    peaks = [peak_bytes(lambda: chain(n), [w], [x]) for n in range(1, 6)]
    assert [b - a for a, b in zip(peaks, peaks[1:])] == [400]*4
