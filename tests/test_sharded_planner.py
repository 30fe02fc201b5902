"""Hecate's planner: every expert has one owner, copies come on top, nobody receives more than what moves."""
import numpy as np
import pytest
from moe_merge_nb.sharded.planner import (degree, dispatch, expected, in_order, materialise, moved, share_slots, shard,
                                          top)

def cases():
    "Random loads with layers, experts, devices, nodes, degrees and memories of many kinds."
    rng = np.random.default_rng(0)
    for L, E, D, node in [(1, 4, 2, 1), (3, 7, 4, 2), (4, 22, 8, 4), (2, 16, 4, 1), (4, 22, 64, 8), (1, 3, 5, 1)]:
        for t, m in [(0, 0), (1, 1), (2, 5), (3, 1), (6, 2), (30, 30), (30, 0)]:
            yield rng.dirichlet(np.full(E, .4), size=L), D, node, t, m

def test_every_expert_has_one_owner_and_all_own_the_same_number_up_to_one():
    for F, D, node, t, m in cases():
        P0 = shard(F, D, t, node)
        assert (P0.sum(-1) == 1).all()
        owned = P0.sum((0, 1))
        assert owned.min() == F.size // D and owned.max() == -(-F.size // D)

def test_copies_come_on_top_within_memory_and_never_more_than_what_moves():
    for F, D, node, t, m in cases():
        for f, P0 in zip(F, shard(F, D, t, node)):
            P = materialise(f, P0, t, m, node)
            part, received = moved(P0, P)
            assert (P | P0 == P).all() and (P & ~P0).sum(0).max() <= m
            assert not (P & ~P0)[np.argsort(-f, kind='stable')[t:]].any()
            assert received.max() <= part + 1e-12 and received.sum() <= (D - 1) * part + 1e-12

def test_with_memory_for_all_that_travel_every_device_holds_the_busiest():
    for F, D, node, t, m in cases():
        if t > m: continue
        for f, P0 in zip(F, shard(F, D, t, node)):
            P, J = materialise(f, P0, t, m, node), top(f, t)
            rest = np.setdiff1d(np.arange(len(f)), J)
            assert P[J].all() and (P[rest] == P0[rest]).all()
            assert moved(P0, P)[0] == len(J) / len(f)

def test_even_loads_give_no_device_more_than_its_share_of_experts():
    for E, D in [(8, 4), (7, 4), (22, 4), (22, 8)]:
        F = np.ones((1, E))
        load = dispatch(np.tile(F / D, (D, 1)), shard(F, D, 0)[0]).sum((0, 1))
        assert load.max() <= -(-E // D) + 1e-12

def test_the_next_slot_goes_to_the_most_load_per_copy():
    assert share_slots(np.array([8., 3, 1]), 3, 9).tolist() == [2, 1, 0]    # 8, then 4 before 3, then 3 before 8/3
    assert share_slots(np.array([8., 3, 1]), 9, 2).tolist() == [1, 1, 1]    # no more than devices
    assert share_slots(np.array([5., 0]), 2, 9).tolist() == [2, 0]          # none to those without load

def test_inputs_stay_here_else_near_else_anywhere():
    P = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    sent = dispatch(np.full((4, 3), 6), P, node=2)
    assert sent.sum(-1).tolist() == [[6] * 3] * 4 and (sent[:, ~P] == 0).all()
    assert sent[0, 0].tolist() == [6, 0, 0, 0]                              # here
    assert sent[0, 1].tolist() == [0, 6, 0, 0] and sent[3, 1].tolist() == [0, 0, 6, 0] # near
    assert sent[0, 2].tolist() == [0, 0, 3, 3]                              # anywhere
    assert sent[2, 2].tolist() == [0, 0, 6, 0]

def test_owners_are_spread_by_load_where_order_would_put_the_busy_together():
    F = np.array([[9., 8, 7, 6, 1, 1, 1, 1]])
    def largest(P): return dispatch(np.tile(F / 2, (2, 1)), P).sum((0, 1)).max()
    assert largest(in_order(8, 2)) == 30 and largest(shard(F, 2, 0)[0]) == 17

def test_what_is_expected_is_the_mean_of_the_last_five():
    counts = np.arange(7)[:, None] * np.array([1, 10])
    assert expected(counts).tolist() == [4, 40] and expected(counts[:2]).tolist() == [.5, 5]
    assert degree(1e-3, 10e9, 4e6) == 2

def test_nodes_must_divide_devices():
    with pytest.raises(ValueError, match='4 devices in nodes of 3: choose a divisor of 4'):
        shard(np.ones((1, 4)), 4, 0, 3)
