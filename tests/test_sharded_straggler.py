"""The simulation of time per step: small cases by hand."""
from dataclasses import replace
from functools import partial
import numpy as np
import pytest
from moe_merge_nb.sharded.planner import in_order
from moe_merge_nb.sharded.straggler import (Cluster, expert_parallel, fssdp, fully_sharded, knowing, seconds, simulate,
                                            waiting)

# an expert has 8 numbers, 16 bytes; a token in it takes 16 / 1 s; the rest of the layer 4 * 8 / 1 s
TINY = Cluster(devices=2, bandwidth=1., flops=1., width=1, tokens=4, k=1)

def test_what_a_cluster_says_of_itself():
    assert (TINY.size, TINY.token, TINY.T_other, TINY.t) == (16, 16, 32, 2)
    assert replace(TINY, bandwidth=.4).t == 0

def test_all_wait_for_the_owner_of_the_only_expert_in_use():
    P0 = in_order(2, 2)
    # 8 inputs at one device: 3 * 8 * 16; nothing gathered: 3 * 32; 4 inputs of 2 bytes travel, 4 times
    assert seconds(np.array([1., 0]), P0, P0, TINY) == 3*8*16 + 3*32 + 4*4*2
    # it is everywhere: 4 inputs at each device, 16 bytes gathered while the rest computes, no input travels
    both = P0 | np.array([[True, True], [False, False]])
    assert seconds(np.array([1., 0]), P0, both, TINY) == 3*4*16 + 3*32
    # a slower network: gathering takes longer than the rest
    assert seconds(np.array([1., 0]), P0, both, replace(TINY, bandwidth=.25)) == 3*4*16 + 3*64

def counts(n=300, seed=0):
    "Of two layers with eight experts, whose favourites stay."
    rng = np.random.default_rng(seed)
    favourites = rng.dirichlet(np.full(8, .3), size=2)
    return np.stack([rng.multinomial(64, p, size=n) for p in favourites], axis=1).astype(float)

def test_plans_keep_what_the_planner_promises():
    x = counts()
    for plan in (expert_parallel, fully_sharded, fssdp, knowing):
        P0, P = plan(x, 120, Cluster(4, 300e9))
        assert P0.shape == P.shape == (2, 8, 4) and (P0.sum(-1) == 1).all() and (P | P0 == P).all()

def test_a_plan_sees_the_past_only():
    x = counts()
    other = x.copy()
    other[120:] = counts(seed=1)[120:]
    for a, b in zip(fssdp(x, 120, Cluster(4, 300e9)), fssdp(other, 120, Cluster(4, 300e9))): assert (a == b).all()

def test_sharding_is_made_every_hundred_iterations_copies_in_each():
    x = np.concatenate([counts(), counts(seed=1)])                          # other favourites from 300 on
    at = {i: fssdp(x, i, Cluster(4), t=2) for i in (299, 305, 399, 400)}
    assert (at[305][0] == at[399][0]).all() and (at[399][0] != at[400][0]).any()
    busiest = x[300:305].mean(0).argmax(-1)
    assert all(P[e].all() for P, e in zip(at[305][1], busiest))

def test_groups_are_alike():
    x = counts(30)
    for plan in (expert_parallel, fssdp):
        assert simulate(x, Cluster(64), plan, [20]) == simulate(x, Cluster(16), plan, [20])
    assert simulate(x, Cluster(64), partial(fssdp, group=64), [20]) > simulate(x, Cluster(16), fssdp, [20])

def test_with_everything_everywhere_nobody_waits():
    x = counts()
    assert waiting(x, fully_sharded, [50, 60]) == pytest.approx(1)
    assert waiting(x, partial(fssdp, t=4), [50, 60]) < waiting(x, expert_parallel, [50, 60])
