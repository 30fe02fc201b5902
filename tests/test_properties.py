"""What must hold of the pure core for any input, tried by hypothesis on inputs that nobody would write down: ties, NaN,
one expert, one image, empty lists."""
import copy
import math
from itertools import pairwise
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.layer.adapt import AdaptedCLIP, trainable
from moe_merge_nb.layer.experts import Expert, balance, many, read, write
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_few, mix_gathered, mix_loop, mix_segments, mix_selected, selected
from moe_merge_nb.layer.moe import MoE, Routing, mixture
from moe_merge_nb.layer.router import top_k_gates, top_p_gates
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.learn.settings import lr_factor
from moe_merge_nb.merge.align import align
from moe_merge_nb.merge.combine import choose, mean, usage_weighted
from moe_merge_nb.merge.freeze import freeze_most_used, most_used
from moe_merge_nb.merge.rule import Merge, merge_iterations, merge_once
from moe_merge_nb.merge.usage import Usage, since, usage_rows
from moe_merge_nb.safe.batches import batch_indices
from moe_merge_nb.safe.checkpoint import read_tree, write_tree
from moe_merge_nb.streams.images import few_shot, saved_few_shot
from stacked import mix_stacked

near = torch.testing.assert_close
seeds = st.integers(0, 2**31)


# ---- inputs

def generator(seed):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)

def vector(elements, n, **how):
    "A tensor of `n` numbers."
    return st.lists(elements, min_size=n, max_size=n, **how).map(torch.tensor)

def some_of(n, max_size=None):
    "A few of the numbers below `n`, one of them perhaps twice."
    return st.lists(st.integers(0, n - 1), max_size=n if max_size is None else max_size)

@st.composite
def logits_and_k(draw, low=-40., high=40., distinct=False):
    "Logits (batch, experts) with many ties, unless `distinct`, and how many experts run."
    rows, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    if distinct:
        orders = [torch.randperm(experts, generator=generator(draw(seeds))) for _ in range(rows)]
        x = torch.stack(orders) / 4
    else:
        values = st.one_of(st.sampled_from([0., -0., 1., -1.]), st.floats(low, high, width=32))
        x = torch.from_numpy(draw(hnp.arrays(np.float32, (rows, experts), elements=values)))
    return x.float(), draw(st.integers(1, experts))

@st.composite
def experts_of(draw, n=None, dtype=torch.float32):
    "A list of experts whose tensors are all random, of any scale and size; dead neurons among them."
    n, width, rank = n or draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    scale, g = 10.**draw(st.integers(-4, 4)), generator(draw(seeds))
    made = many(lambda: Expert(width, rank, dropout=0.), n).to(dtype).eval()
    dead = draw(some_of(rank, max_size=2))
    for e in made:
        write(e, {name: scale * torch.randn(p.shape, generator=g, dtype=dtype) for name, p in e.named_parameters()})
        with torch.no_grad(): e.up.weight[:, dead] = 0
    return made

@st.composite
def a_mixture(draw, shared_init=None):
    "A `MoE` with random experts and one router, and k."
    n = draw(st.integers(1, 7))
    k, seed = draw(st.integers(1, n)), draw(seeds)
    width, rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    if shared_init is None: shared_init = draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        moe = MoE('image', 0, width, Experts(n, rank, top_k=k, shared_init=shared_init))
        moe.add_task()
        for p in moe.parameters(): torch.nn.init.normal_(p)
    return moe.eval(), k

def small(y, part):
    "This part of the largest entry of `y`."
    return part * float(y.detach().abs().max()) + 1e-30

VISION = CLIPVisionCfg(image_size=8, patch_size=4, width=8, layers=1, head_width=4)
TEXT = CLIPTextCfg(context_length=6, vocab_size=20, width=8, heads=2, layers=1)

def tiny(n_experts):
    "An adapted CLIP of one block a tower."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaptedCLIP(CLIP(8, VISION, TEXT).eval(), n_experts=n_experts, rank=2, top_k=min(2, n_experts))


# ---- gates

@given(logits_and_k())
def test_gates_are_positive_for_exactly_k_experts_and_sum_to_1(case):
    logits, k = case
    gates = top_k_gates(logits, k)
    assert gates.shape == logits.shape and (gates >= 0).all()
    assert (gates > 0).sum(1).eq(k).all()
    near(gates.sum(1), torch.ones(len(logits)))

@given(logits_and_k())
def test_no_closed_gate_had_a_larger_logit_than_an_open_one_and_of_equals_the_first_are_open(case):
    logits, k = case
    for h, g in zip(logits.tolist(), top_k_gates(logits, k).tolist()):
        best = sorted(range(len(h)), key=lambda e: (-h[e], e))[:k]
        assert {e for e, v in enumerate(g) if v > 0} == set(best)

@given(logits_and_k(low=-2.**127, high=2.**127))
def test_a_row_of_any_finite_logits_opens_1_to_k_experts_that_sum_to_1(case):
    logits, k = case  # a softmax weight below 1e-45 is 0: fewer than k are left
    gates = top_k_gates(logits, k)
    assert ((gates > 0).sum(1) <= k).all() and (gates > 0).any(1).all()
    near(gates.sum(1), torch.ones(len(logits)))

@given(logits_and_k(), st.sampled_from([math.nan, math.inf]), st.data())
def test_a_row_with_nan_or_infinity_comes_out_as_nan_and_the_others_as_if_it_were_not_there(case, bad, data):
    logits, k = case
    rows, experts = logits.shape
    row, e = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, experts - 1))
    poisoned = logits.clone()
    poisoned[row, e] = bad
    for gate in (lambda h: top_k_gates(h, k), lambda h: top_p_gates(h, .4)):
        clean, found = gate(logits), gate(poisoned)
        assert found[row].sum().isnan(), 'NaN must not turn into a gate that looks right'
        others = [r for r in range(rows) if r != row]
        assert torch.equal(found[others], clean[others])

@given(logits_and_k(distinct=True), seeds)
def test_a_permutation_of_experts_permutes_the_gates(case, seed):
    logits, k = case
    p = torch.randperm(logits.shape[1], generator=generator(seed))
    near(top_k_gates(logits[:, p], k), top_k_gates(logits, k)[:, p], rtol=0, atol=1e-7)
    near(top_p_gates(logits[:, p], .7), top_p_gates(logits, .7)[:, p], rtol=0, atol=1e-7)

@given(logits_and_k(), st.floats(-10, 10, width=32))
def test_gates_do_not_change_when_all_logits_grow_by_the_same(case, c):
    logits, k = case
    logits = (logits * 8).round() / 8  # sums without rounding, so that ties stay ties
    near(top_k_gates(logits + round(c), k), top_k_gates(logits, k))

@given(st.integers(-3, 12), st.integers(1, 8))
def test_k_is_refused_unless_there_are_as_many_experts(k, n):
    if 1 <= k <= n: assert (top_k_gates(torch.zeros(2, n), k) > 0).sum() == 2 * k
    else:
        with pytest.raises(ValueError, match=f'top_k is {k}'): top_k_gates(torch.zeros(2, n), k)

@given(logits_and_k(low=-6, high=6), st.floats(0, 1))
def test_top_p_opens_the_smallest_set_whose_mass_exceeds_p(case, p):
    logits, slack = case[0], 1e-5
    gates, P = top_p_gates(logits, p), logits.softmax(1)
    assert torch.equal(gates[gates > 0], P[gates > 0]), 'open gates carry their softmax mass'
    for g, full in zip(gates, P):
        assert g.sum() >= min(p, 1) - slack
        assert g.sum() - g[g > 0].min() <= p + slack, 'without its smallest the set would not exceed p'
        assert not (g == 0).any() or g[g > 0].min() >= full[g == 0].max()

@given(logits_and_k(low=-80, high=80))
def test_top_p_of_1_opens_all_experts_and_of_0_one(case):
    logits, _ = case
    assert torch.equal(top_p_gates(logits, 1.), logits.softmax(1))
    assert (top_p_gates(logits, 0.) > 0).sum(1).eq(1).all()

@given(seeds, st.integers(2, 300))
def test_top_p_of_1_opens_all_of_many_experts(seed, n):
    logits = randn(4, n, seed=seed)
    assert torch.equal(top_p_gates(logits, 1.), logits.softmax(1))

@given(st.floats(allow_nan=True))
def test_p_is_refused_outside_0_to_1(p):
    if 0 <= p <= 1: top_p_gates(torch.zeros(1, 2), p)
    else:
        with pytest.raises(ValueError, match='top_p is'): top_p_gates(torch.zeros(1, 2), p)


# ---- mixtures

FAST = mix_stacked, mix_gathered, mix_segments

@st.composite
def gates_for(draw, n, rows):
    "Any gates with an open one in every row: as top-p makes them, rows open different numbers of experts."
    values = st.sampled_from([0., 0., .25, .5, 1.])
    g = torch.from_numpy(draw(hnp.arrays(np.float32, (rows, n), elements=values)))
    for i in range(rows): g[i, draw(st.integers(0, n - 1))] = .75
    return g

@given(experts_of(dtype=torch.float64), st.data())
def test_every_formulation_of_the_mixture_equals_the_obvious_one(experts, data):
    n, tokens, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), experts[0].down.in_features
    x = randn(n, tokens, width, seed=data.draw(seeds), dtype=torch.float64)
    gates = data.draw(gates_for(len(experts), n)).double()
    y = mix_loop(x, gates, experts)
    for mix in FAST: near(mix(x, gates, experts), y, rtol=1e-9, atol=small(y, 1e-9))

@given(experts_of(dtype=torch.float64), st.data())
def test_one_bottleneck_of_all_experts_in_use_equals_the_obvious_one(experts, data):
    n, tokens, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), experts[0].down.in_features
    x = randn(n, tokens, width, seed=data.draw(seeds), dtype=torch.float64)
    gates = data.draw(gates_for(len(experts), n)).double()
    y, used = mix_loop(x, gates, experts), selected(gates)[0].unique()
    with torch.no_grad(): near(mix_few(x, gates, experts, used), y, rtol=1e-9, atol=small(y, 1e-9))

@given(experts_of(dtype=torch.float64), st.data())
def test_a_permutation_of_experts_leaves_the_output(experts, data):
    x = randn(3, 2, experts[0].down.in_features, seed=data.draw(seeds), dtype=torch.float64)
    gates = data.draw(gates_for(len(experts), 3)).double()
    p = data.draw(st.permutations(range(len(experts))))
    moved = torch.nn.ModuleList(experts[e] for e in p)
    for mix in (mix_loop, *FAST):
        y = mix(x, gates, experts)
        near(mix(x, gates[:, p], moved), y, rtol=1e-9, atol=small(y, 1e-9))

@given(experts_of(), st.integers(0, 5))
def test_equal_experts_say_together_what_one_says_alone(experts, n_open):
    for e in experts[1:]: write(e, read(experts[0]))
    gates = top_k_gates(randn(3, len(experts)), max(1, min(n_open, len(experts))))
    x = randn(3, 4, experts[0].down.in_features)
    alone = experts[0](x)
    near(mix_stacked(x, gates, experts), alone, rtol=1e-3, atol=small(alone, 1e-5))

@given(experts_of(), st.data())
def test_a_sequence_is_mixed_as_if_it_were_alone(experts, data):
    x = randn(4, 3, experts[0].down.in_features)
    gates = data.draw(gates_for(len(experts), 4))
    y = mix_stacked(x, gates, experts)
    for i in range(4):
        alone = mix_stacked(x[i:i + 1], gates[i:i + 1], experts)
        near(alone, y[i:i + 1], rtol=1e-3, atol=small(y, 1e-5))

@given(experts_of(), st.data())
def test_a_sequence_whose_gates_are_nan_comes_out_as_nan_and_the_others_as_they_were(experts, data):
    x = randn(3, 2, experts[0].down.in_features)
    gates, row = data.draw(gates_for(len(experts), 3)), data.draw(st.integers(0, 2))
    poisoned = gates.clone()
    poisoned[row] = math.nan
    for mix in (mix_loop, *FAST):
        y, clean = mix(x, poisoned, experts), mix(x, gates, experts)
        assert y[row].isnan().all()
        others = [i for i in range(3) if i != row]
        near(y[others], clean[others], rtol=1e-3, atol=small(clean, 1e-5))

@pytest.mark.parametrize('mix', [*FAST, mix_selected])
@pytest.mark.parametrize('gates', [torch.full((2, 3), math.nan), torch.zeros(2, 3)], ids=['nan', 'closed'])
def test_gates_that_are_all_nan_or_closed_are_mixed_like_any_others(mix, gates):
    experts, x = many(lambda: Expert(4, 2), 3).eval(), randn(2, 5, 4)
    near(mix(x, gates, experts), mix_loop(x, gates, experts), equal_nan=True)

def test_no_sequence_is_no_output():
    assert mix_selected(randn(0, 5, 4), torch.zeros(0, 3), many(lambda: Expert(4, 2), 3)).shape == (0, 5, 4)


# ---- usage

@given(a_mixture(), st.lists(st.integers(1, 9), min_size=1, max_size=4), seeds)
def test_counts_add_up_to_k_per_sequence(made, batches, seed):
    (moe, k), usage = made, Usage()
    for i, n in enumerate(batches): mixture(moe, randn(n, 3, moe.width, seed=seed + i), 0, usage)
    counts, n = usage.counts['image', 0], sum(batches)
    assert counts.dtype == torch.int64 and counts.shape == (len(moe.experts),)
    assert counts.sum() == k * n
    assert (counts >= 0).all() and (counts <= n).all()
    assert sum(r['count'] for r in usage_rows(usage.counts, 'a')) == k * n

@given(st.lists(hnp.arrays(np.bool_, (3, 4)), min_size=1, max_size=6), st.data())
def test_the_usage_of_two_windows_adds_up_to_that_of_both(selections, data):
    usage, moments = Usage(), [{}]
    for chosen in selections:
        gates = torch.from_numpy(chosen).float()
        usage(Routing('text', block=1, task=0, x=None, logits=None, gates=gates))
        moments.append(dict(usage.counts))
    cut = data.draw(st.integers(0, len(selections)))
    first, second, whole = since(moments[cut], {}), since(moments[-1], moments[cut]), since(moments[-1], {})
    none = torch.zeros(4, dtype=torch.int64)
    for key in whole: assert torch.equal(first.get(key, none) + second[key], whole[key])
    assert int(whole['text', 1].sum()) == sum(int(c.sum()) for c in selections)


# ---- merging

AVERAGES = {'mean': mean, 'usage_weighted': usage_weighted}
averages = st.sampled_from(sorted(AVERAGES))
three_counts = vector(st.integers(0, 50), 3)

def permuted(state, p):
    "The same function with its neurons in another order."
    p = list(p)
    return {
        **state,
        'down.weight': state['down.weight'][p],
        'down.bias': state['down.bias'][p],
        'up.weight': state['up.weight'][:, p],
    }

@given(experts_of(n=1), st.integers(2, 5), averages, st.data())
def test_the_merge_of_identical_experts_is_that_expert(experts, n, rule, data):
    state = read(experts[0])
    counts = data.draw(vector(st.integers(0, 1000), n))
    merged = AVERAGES[rule]([state] * n, counts, None)
    for name, t in merged.items(): near(t, state[name], rtol=1e-6, atol=1e-30)

@given(experts_of(n=3), averages, three_counts, st.data())
def test_merging_commutes_with_a_permutation_of_neurons(experts, rule, counts, data):
    p = data.draw(st.permutations(range(experts[0].down.out_features)))
    states, f = [read(e) for e in experts], AVERAGES[rule]
    merged, moved = f(states, counts, None), f([permuted(s, p) for s in states], counts, None)
    for name, t in permuted(merged, p).items(): assert torch.equal(moved[name], t)

@given(experts_of(n=3), averages, st.permutations(range(3)), three_counts)
def test_merging_does_not_depend_on_the_order_of_the_sources(experts, rule, order, counts):
    states, f = [read(e) for e in experts], AVERAGES[rule]
    merged, other = f(states, counts, None), f([states[i] for i in order], counts[list(order)], None)
    for name, t in merged.items(): near(other[name], t, rtol=1e-4, atol=small(t, 1e-5))

def said_by(expert, state, x):
    "What an expert with this state says."
    expert = copy.deepcopy(expert)
    write(expert, state)
    return expert(x).detach()

@given(experts_of(n=1, dtype=torch.float64), st.data())
def test_the_aligned_merge_of_an_expert_with_its_permuted_copy_loses_nothing(experts, data):
    expert, state = experts[0], read(experts[0])
    copy_ = permuted(state, data.draw(st.permutations(range(expert.down.out_features))))
    a, b = balance(state), balance(copy_)
    x = randn(6, expert.down.in_features, seed=1, dtype=torch.float64)
    before = expert(x).detach()
    merged = said_by(expert, mean([a, align(a, b)]), x)
    near(merged, before, rtol=1e-9, atol=small(before, 1e-9))

@given(experts_of(n=2, dtype=torch.float64))
def test_balancing_and_aligning_change_no_output(experts):
    x = randn(6, experts[0].down.in_features, seed=2, dtype=torch.float64)
    a, b = (balance(read(e)) for e in experts)
    for e, s in zip(experts, (a, align(a, b))):
        before = e(x).detach()
        near(said_by(e, s, x), before, rtol=1e-9, atol=small(before, 1e-9))

rules = st.builds(
    Merge,
    combine=st.sampled_from(['mean', 'usage_weighted', 'submoe', 'dern']),
    align=st.booleans(),
    router=st.sampled_from(['keep', 'mean', 'zero']),
    n_sources=st.integers(2, 3),
)

def copied(moe):
    "Its state, which does not change when the mixture does."
    return copy.deepcopy(moe.state_dict())

def only_the_target_changed(moe, before, event, rule):
    "One expert, and of the router its column; none of it if the router is kept."
    now, target = moe.state_dict(), event['target']
    changed = {name for name, t in now.items() if not torch.equal(t, before[name])}
    router = 'routers.0.gate'
    assert all(name.startswith(f'experts.{target}.') or name == router for name in changed)
    others = [e for e in range(len(moe.experts)) if e != target]
    assert torch.equal(now[router][:, others], before[router][:, others])
    if rule.router == 'keep': assert router not in changed

def is_the_choice_of_the_rule(event, moe, counts, protected):
    "The target is the least used of those that may be written over; no other expert is used more than a source."
    target, sources = event['target'], event['sources']
    spared = {*protected, *sources, *moe.frozen.nonzero().flatten().tolist()}
    assert target not in spared
    usable = [counts[e] for e in range(len(counts)) if e not in spared]
    assert counts[target] == min(usable)
    rest = [counts[e] for e in range(len(counts)) if e not in (target, *sources)]
    assert counts[sources].min() >= max(rest, default=0)

@given(a_mixture(), rules, st.data())
def test_a_merge_keeps_shapes_and_finiteness_and_writes_over_one_open_unprotected_expert(made, rule, data):
    moe, _ = made
    n = len(moe.experts)
    counts = data.draw(vector(st.integers(0, 20), n))
    moe.freeze(data.draw(some_of(n)))
    protected = set(data.draw(some_of(n)))
    before = copied(moe)
    event = merge_once(moe, counts, rule, protected)
    now = moe.state_dict()
    assert {k: t.shape for k, t in now.items()} == {k: t.shape for k, t in before.items()}
    assert all(t.isfinite().all() for t in now.values())
    if event['kind'] == 'no_merge':
        assert all(torch.equal(t, before[name]) for name, t in now.items())
        return
    only_the_target_changed(moe, before, event, rule)
    is_the_choice_of_the_rule(event, moe, counts, protected)

@given(a_mixture(shared_init=False), st.booleans(), st.data())
def test_a_merge_commutes_with_a_permutation_of_experts(made, aligned, data):
    moe, _ = made
    n, rule = len(moe.experts), Merge(align=aligned)
    counts = data.draw(vector(st.integers(1, 99), n, unique=True))
    p = data.draw(st.permutations(range(n)))
    moved = copy.deepcopy(moe)
    for to, e in enumerate(p): write(moved.experts[to], read(moe.experts[e]))
    frozen = data.draw(some_of(n, max_size=2))
    moe.freeze(frozen)
    moved.freeze([p.index(e) for e in frozen])
    a, b = merge_once(moe, counts, rule), merge_once(moved, counts[list(p)], rule)
    assert a['kind'] == b['kind']
    assert [p[e] for e in b['sources']] == a['sources']
    if a['target'] is not None: assert p[b['target']] == a['target']
    for to, e in enumerate(p):
        for name, t in read(moved.experts[to]).items(): near(t, read(moe.experts[e])[name])

@given(st.integers(0, 400), st.one_of(st.none(), st.integers(1, 500)), st.floats(0, 1, exclude_min=True))
def test_merges_come_in_order_and_none_after_the_limit(n, every, until):
    when = merge_iterations(Merge(every=every, until=until), n)
    last = int(until * n)
    assert all(a < b for a, b in pairwise(when))
    assert all(1 <= i <= until * n for i in when)
    if every is None: assert len(when) == min(4, last)
    else: assert list(when) == [i for i in range(1, last + 1) if i % every == 0]

@given(hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 5)), st.data())
def test_sources_are_used_and_the_target_is_no_source(counts, data):
    counts = torch.from_numpy(counts)
    frozen = torch.from_numpy(data.draw(hnp.arrays(np.bool_, len(counts))))
    n, may = data.draw(st.integers(2, 4)), data.draw(st.booleans())
    sources, target = choose(counts, frozen, n_sources=n, frozen_sources=may)
    assert len(set(sources)) == len(sources)
    assert all(counts[e] > 0 for e in sources)
    assert may or not any(frozen[e] for e in sources)
    if target is not None: assert target not in sources and not frozen[target]


# ---- freezing

STEPS = {
    'use': lambda moe, counts, seed: moe.freeze(most_used(counts)),
    'list': lambda moe, counts, seed: moe.freeze((counts > 6).nonzero().flatten().tolist()),
    'merge': lambda moe, counts, seed: merge_once(moe, counts, Merge(align=seed % 2 == 0, router='mean')),
    'task': lambda moe, counts, seed: moe.add_task(),
}

@given(a_mixture(), st.lists(st.tuples(st.sampled_from(list(STEPS)), seeds), max_size=8))
def test_an_expert_that_is_frozen_stays_frozen_and_unchanged_whatever_comes(made, steps):
    moe, _ = made
    kept = {}
    for kind, seed in steps:
        counts = torch.randint(0, 9, (len(moe.experts),), generator=generator(seed))
        STEPS[kind](moe, counts, seed)
        now = set(moe.frozen.nonzero().flatten().tolist())
        assert now >= kept.keys()
        kept |= {e: read(moe.experts[e]) for e in now - kept.keys()}
        for e, state in kept.items():
            assert not any(p.requires_grad for p in moe.experts[e].parameters())
            assert all(torch.equal(t, state[name]) for name, t in read(moe.experts[e]).items())

def opens(module, opened):
    "Which of `True` and `False` are told of its parameters: are they among those opened?"
    return {id(p) in opened for p in module.parameters()}

usages = st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), max_size=4)

@given(st.integers(1, 4), usages, st.integers(0, 5))
def test_what_is_opened_for_training_never_includes_what_is_frozen(n_experts, tasks, n):
    model = tiny(n_experts)
    for usage in tasks:
        model.add_task()
        counts = torch.tensor(usage[:n_experts])
        freeze_most_used(model, {(m.tower, m.block): counts for m in model.moes}, n)
        opened = {id(p) for p in trainable(model)}
        for moe in model.moes:
            for e, expert in enumerate(moe.experts): assert opens(expert, opened) == {not moe.frozen[e]}
            *old, new = moe.routers
            assert opens(new, opened) == {True}
            assert all(opens(r, opened) == {False} for r in old)

@given(hnp.arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 4)), st.integers(0, 10))
def test_the_most_used_are_at_most_n_all_used_and_nobody_else_was_used_more(counts, n):
    found = most_used(torch.from_numpy(counts), n)
    rest = [c for e, c in enumerate(counts) if e not in found]
    assert len(found) == min(n, int((counts > 0).sum()))
    assert all(counts[e] > 0 for e in found)
    if found: assert min(counts[found]) >= max(rest, default=0)


# ---- metrics

percentages = st.floats(0, 100)
any_number = st.one_of(percentages, st.sampled_from([math.nan, math.inf, -math.inf]))
any_shape = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
squares = st.integers(1, 7).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=percentages))

def means_of_the_definition(A):
    "Transfer, Average and Last, added up one by one."
    T = len(A)
    below = [[A[j, i] for j in range(i)] for i in range(1, T)]  # before a task is learned
    transfer = sum(sum(b) / len(b) for b in below) / (T - 1) if T > 1 else math.nan
    return transfer, A.sum() / T**2, sum(A[T - 1, i] for i in range(T)) / T

def check_metrics(A):
    m, wanted = mtil_metrics(A), means_of_the_definition(A)
    found = m.transfer, m.average, m.last
    assert found == pytest.approx(wanted, nan_ok=len(A) == 1)
    for v in found[len(A) == 1:]: assert A.min() - 1e-9 <= v <= A.max() + 1e-9
    for per_task in (m.transfer_per_task, m.average_per_task, m.last_per_task): assert per_task.shape == (len(A),)

@given(hnp.arrays(np.float64, any_shape, elements=any_number))
def test_metrics_of_a_matrix_of_any_shape_are_its_means_or_it_is_refused(A):
    square = A.ndim == 2 and A.shape[0] == A.shape[1] and A.size
    if square and np.isfinite(A).all(): check_metrics(A)
    else:
        with pytest.raises(ValueError, match='must be square|must be evaluated'): mtil_metrics(A)

@given(squares)
def test_metrics_of_a_square_matrix_are_the_means_of_the_definition(A):
    check_metrics(A)


# ---- experts, trees, orders, lists

PARTS = ['down.weight', 'down.bias', 'up.weight', 'up.bias']

@given(experts_of(n=2), st.sampled_from(PARTS), st.sampled_from(['missing', 'extra', 'shape']))
def test_an_expert_takes_a_whole_state_or_nothing_of_it(experts, name, wrong):
    a, b = experts
    state, before = read(b), read(a)
    if wrong == 'missing': del state[name]
    if wrong == 'extra': state['else'] = torch.zeros(1)
    if wrong == 'shape': state[name] = state[name][..., None]
    with pytest.raises(ValueError, match='else' if wrong == 'extra' else name): write(a, state)
    assert all(torch.equal(t, before[k]) for k, t in read(a).items())
    write(a, read(b))
    assert all(torch.equal(t, read(a)[k]) for k, t in read(b).items())

@st.composite
def tensors(draw):
    "A tensor of any kind and shape."
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return (randn(*shape, seed=draw(seeds)) * 50).to(kind)

def inner(inside):
    "Lists and dictionaries of these nodes."
    return st.one_of(st.lists(inside, max_size=4), st.dictionaries(keys, inside, max_size=4))

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]
keys = st.one_of(st.text(max_size=5), st.sampled_from(['tensor', 'dict', 't0', '__metadata__', '']))
numbers = st.one_of(st.integers(), st.floats(allow_nan=False))
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), tensors())
trees = st.recursive(leaves, inner, max_leaves=12)

def same(a, b):
    "Trees that are equal to the bit, their dictionaries in the same order."
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    return a == b

@given(trees)
def test_a_tree_is_read_as_it_was_written(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp()/'tree.safetensors'
    assert same(tree, read_tree(write_tree(tree, path)))
    assert [p.name for p in path.parent.glob('.tree*')] == []

@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 12), seeds)
def test_batches_are_full_and_no_image_comes_twice_before_all_came_once(n, batch, iterations, seed):
    order = list(batch_indices(n, batch, iterations, seed))
    assert [len(b) for b in order] == [batch] * iterations
    flat = [i for b in order for i in b]
    for begin in range(0, len(flat), n):
        part = flat[begin:begin + n]
        assert len(set(part)) == len(part) and set(part) <= set(range(n))
    assert order == list(batch_indices(n, batch, iterations, seed))

@given(st.integers(1, 300), st.data())
def test_the_learning_rate_stays_between_0_and_its_peak_and_reaches_it(n, data):
    w = data.draw(st.integers(0, n))
    f = [lr_factor(i, n, w) for i in range(n)]
    assert all(0 <= x <= 1 for x in f) and max(f) == 1
    assert all(a <= b for a, b in pairwise(f[:w]))
    assert all(a >= b for a, b in pairwise(f[w:]))

@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 5))
def test_a_few_shot_list_has_as_many_of_each_class_or_names_the_class_that_has_fewer(labels, shots, seed):
    counts = np.bincount(labels)
    short = [c for c in np.unique(labels) if counts[c] < shots]
    if short:
        says = f'class {short[0]} has {counts[short[0]]} training images'
        with pytest.raises(ValueError, match=says): few_shot(labels, shots, seed)
        return
    found = few_shot(labels, shots, seed)
    assert found == sorted(set(found)) == few_shot(labels, shots, seed)
    assert np.bincount(np.array(labels)[found]).tolist() == [shots * (c > 0) for c in counts]

@given(st.lists(st.integers(0, 2), min_size=3, max_size=12), seeds)
def test_a_saved_few_shot_list_is_the_drawn_one_and_is_refused_for_other_labels(tmp_path_factory, labels, seed):
    path = tmp_path_factory.getbasetemp()/'few.json'
    path.unlink(missing_ok=True)
    saved = lambda labels, seed: saved_few_shot(path, labels, 1, seed)
    assert saved(labels, seed) == few_shot(labels, 1, seed) == saved(labels, seed)
    for others in ([*labels, 0], seed), (labels, seed + 1):
        with pytest.raises(ValueError, match='was made for other data'): saved(*others)
