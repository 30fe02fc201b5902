import torch
from moe_merge_nb.layer.experts import *
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import *
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.merge.start import *
def a_layer(n=6, frozen=(), **how):
    "A layer that has learned a task; all its numbers are random."
    moe = MoE('image', 0, 8, Experts(n_experts=n, rank=3, **how))
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    moe.freeze(list(frozen))
    return moe


def test_a_task_begins_with_the_mean_of_the_frozen_experts_and_spares_the_protected():
    torch.manual_seed(0)
    moe = a_layer()
    before = [read(e) for e in moe.experts]
    assert start_merged(moe, Merge(start='merged')) is None                 # nothing is frozen yet
    moe.freeze([1, 4])
    event = start_merged(moe, Merge(start='merged'), {5})
    assert event['sources'] == [1, 4] and event['targets'] == [0, 2, 3]
    for e in (1, 4, 5): assert all(torch.equal(before[e][n], t) for n, t in read(moe.experts[e]).items())
    mean = (moe.experts[1].up.weight + moe.experts[4].up.weight)/2
    for e in (0, 2, 3): torch.testing.assert_close(moe.experts[e].up.weight, mean)


def test_pairs_of_frozen_experts_are_averaged_other_two_for_every_open_expert():
    torch.manual_seed(0)
    moe = a_layer(frozen=[1, 3, 4])
    start_merged(moe, Merge(every=0, start='pairs'))
    def up(e): return moe.experts[e].up.weight
    for e, (i, j) in {0: (1, 3), 2: (1, 4), 5: (3, 4)}.items(): torch.testing.assert_close(up(e), (up(i) + up(j))/2)


def test_the_controls_copy_frozen_experts_or_begin_anew():
    torch.manual_seed(0)
    def started(start, **how):
        moe = a_layer(frozen=[1, 4], **how)
        start_merged(moe, Merge(start=start))
        return moe
    moe = started('copy')
    for e, f in {0: 1, 2: 4, 3: 1, 5: 4}.items(): assert torch.equal(moe.experts[e].up.weight, moe.experts[f].up.weight)
    moe = started('fresh')
    assert not any(moe.experts[e].up.weight.any() for e in (0, 2, 3, 5))
    assert not torch.equal(moe.experts[0].down.weight, moe.experts[2].down.weight)
    moe = started('fresh', shared_init=True)
    assert torch.equal(moe.experts[2].down.weight, moe.base.down.weight)  # the common start stays theirs


def test_a_start_of_ones_own_is_one_function():
    def noisy_mean(frozen, n, merge, new):
        mean = merge(frozen)
        return [{name: t + .1*torch.randn_like(t) for name, t in mean.items()} for _ in range(n)]
    torch.manual_seed(0)
    moe = a_layer(frozen=[1, 4])
    start_merged(moe, Merge(start=noisy_mean))
    assert not torch.equal(moe.experts[0].up.weight, moe.experts[2].up.weight)
    assert (moe.experts[0].up.weight - (moe.experts[1].up.weight + moe.experts[4].up.weight)/2).std() < .2
