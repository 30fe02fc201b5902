"""Experts of one layer on several processes: the gradients of one process, and bytes as counted by hand."""
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from moe_merge_nb.layer.experts import Expert
from moe_merge_nb.layer.mix import mix_loop
from moe_merge_nb.safe.devices import in_processes
from moe_merge_nb.sharded.planner import in_order
from moe_merge_nb.sharded.sharded import ShardedExperts, trips

E, WIDTH, RANK, N = 6, 8, 3, 8
NUMBERS = 2 * WIDTH * RANK + WIDTH + RANK

def all_experts():
    torch.manual_seed(0)
    experts = [Expert(WIDTH, RANK, dropout=0.) for _ in range(E)]
    for e in experts: nn.init.normal_(e.up.weight)
    return experts

def batch(step):
    "Eight inputs: the first half select experts 0 and 1, the second half 1 and 2, the last one 4; nobody 3 and 5."
    x, gates = torch.randn(N, 2, WIDTH, generator=torch.Generator().manual_seed(step)), torch.zeros(N, E)
    gates[:4, :2] = gates[4:, 1:3] = .5
    gates[7] = torch.eye(E)[4]
    return x, gates

def train(layer, weights, rows=slice(None)):
    "Gradients of the first step, weights after three."
    optimizer, grads = torch.optim.AdamW(weights or [nn.Parameter(torch.zeros(1))], lr=1e-2), []
    for step in range(3):
        x, gates = (t[rows] for t in batch(step))
        optimizer.zero_grad()
        ((layer(x, gates) - x)**2).sum().div(N).backward()
        grads.append([w.grad for w in weights])
        optimizer.step()
    return grads[0], [w.detach() for w in weights], [len(optimizer.state[w]) > 0 for w in weights]

def work(folder, P0):
    me, n = Accelerator(cpu=True).process_index, P0.shape[1]
    with pytest.raises(ValueError, match='one column for each of'): ShardedExperts(all_experts(), P0[:, :1])
    layer = ShardedExperts(all_experts(), P0)
    left = train(layer, layer.weights, slice(me*N//n, (me + 1)*N//n))
    torch.save((*left, layer.traffic.gathered, layer.traffic.scattered), f'{folder}/{me}.pt')

def in_one_process():
    experts = nn.ModuleList(all_experts())
    grads, weights, _ = train(lambda x, gates: mix_loop(x, gates, experts), [*experts.parameters()])
    def row(ts, e): return None if ts[4*e] is None else torch.cat([t.flatten() for t in ts[4*e:4*e + 4]])
    return [[row(ts, e) for e in range(E)] for ts in (grads, weights)]

def ends(folder, P0):
    in_processes(work, str(folder), P0, n=P0.shape[1])
    return [torch.load(f'{folder}/{i}.pt') for i in range(P0.shape[1])]

def same_as_one(found, P0):
    grads, weights = in_one_process()
    for (own_grads, own_weights, moments, *_), mine in zip(found, P0.T):
        experts = mine.nonzero()[0].tolist()
        assert len(own_weights) == len(experts)
        for e, g, w, has in zip(experts, own_grads, own_weights, moments):
            assert (g is None) == (grads[e] is None) == (not has) == (e in (3, 5))
            if g is not None: torch.testing.assert_close(g, grads[e], atol=1e-6, rtol=0)
            torch.testing.assert_close(w, weights[e], atol=1e-5, rtol=0)

def test_two_processes_give_the_gradients_of_one_and_send_what_the_routing_needs(tmp_path):
    P0 = in_order(E, 2)                                                     # 0 1 2 | 3 4 5
    found = ends(tmp_path, P0)
    same_as_one(found, P0)
    # the second process needs 1 and 2 of the first, and 4, its own: nothing comes the other way
    row, steps = 4 * NUMBERS, 3
    assert [tuple(f[3:]) for f in found] == [(2 * row * steps, 0), (0, 2 * row * steps)]

def test_four_processes_do_one_of_which_owns_nothing(tmp_path):
    P0 = np.zeros((E, 4), dtype=bool)
    P0[range(E), [3, 0, 0, 1, 1, 3]] = True                                 # the third owns none
    found = ends(tmp_path, P0)
    same_as_one(found, P0)
    # inputs 0 1 | 2 3 | 4 5 | 6 7 need 0 1 | 0 1 | 1 2 | 1 2 4
    row, steps = 4 * NUMBERS, 3
    assert [f[3] for f in found] == [5 * row * steps, 1 * row * steps, 0, 2 * row * steps]
    assert [f[4] for f in found] == [1 * row * steps, 2 * row * steps, 2 * row * steps, 3 * row * steps]

def test_what_travels_goes_from_the_owner_to_all_others_that_need_it():
    P0 = torch.tensor([[1, 0, 0], [0, 0, 1]]).bool()
    P = torch.tensor([[1, 1, 1], [0, 0, 1]]).bool()
    assert trips(P0, P) == [(0, 0, 1), (0, 0, 2)] and trips(P0, P0) == []
