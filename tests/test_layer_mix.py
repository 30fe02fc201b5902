import pytest, torch
from torch import nn
from moe_merge_nb.layer.experts import *
from moe_merge_nb.layer.router import *
from moe_merge_nb.layer.mix import *
from stacked import mix_stacked
def busy_experts(n, d, r, **how):
    "Experts that do something: all their tensors are random."
    experts = many(lambda: Expert(d, r, **how), n)
    for p in experts.parameters(): nn.init.normal_(p)
    return experts


def test_all_formulations_are_the_loop_in_outputs_and_gradients():
    torch.manual_seed(1)
    experts = busy_experts(6, 8, 3, scale=0.7, dropout=0.)
    x, logits = torch.randn(10, 5, 8, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    wanted = {}
    for mix in (mix_loop, mix_stacked, mix_gathered, mix_segments):
        for gate in (top_k_gates, lambda h: top_p_gates(h, 0.5)):
            y = mix(x, gate(logits), experts)
            grads = torch.autograd.grad(y.square().sum(), [x, logits, *experts.parameters()], allow_unused=True)
            found = [f if f is not None else torch.zeros(()) for f in (y, *grads)]
            for a, b in zip(wanted.setdefault(gate.__name__, found), found):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gathered_is_stacked_bit_for_bit_dropout_included():
    for k in (1, 2, 3):
        torch.manual_seed(2)
        experts = busy_experts(6, 16, 4)
        x, logits = torch.randn(10, 5, 16, requires_grad=True), torch.randn(10, 6, requires_grad=True)
        found = []
        for mix in (mix_stacked, mix_gathered):
            torch.manual_seed(3)
            y = mix(x, top_k_gates(logits, k), experts)
            grads = torch.autograd.grad(y.square().sum(), [x, logits, *experts.parameters()], allow_unused=True)
            found.append([y, *grads])
        for a, b in zip(*found): assert (a is None and b is None) or torch.equal(a, b)


def test_sixteen_bits_work_and_stay_near():
    torch.manual_seed(1)
    experts = busy_experts(6, 8, 3, dropout=0.)
    x, gates = torch.randn(10, 5, 8, requires_grad=True), top_k_gates(torch.randn(10, 6))
    want = torch.autograd.grad(mix_loop(x, gates, experts).square().sum(), [x, experts[0].up.weight])
    for mix in (mix_stacked, mix_gathered, mix_segments):
        with torch.autocast('cpu', torch.bfloat16): y = mix(x, gates, experts)
        for a, b in zip(torch.autograd.grad(y.float().square().sum(), [x, experts[0].up.weight]), want):
            assert a.dtype == b.dtype and (a - b).norm() < .05 * b.norm()
