"Merges know where they are, those that could never happen are refused by field, and a rule that goes wrong is named"

import random
from dataclasses import replace
import numpy as np
import pytest
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE
from moe_merge_nb.learn.callbacks import FreezeMostUsed, MergeMostUsed
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method, build
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.merge.combine import COMBINE, Where, mean
from moe_merge_nb.merge.rule import Merge, RuleFailed, check_rule, merge_once
from moe_merge_nb.merge.start import start_merged
from moe_merge_nb.rewrites.bank import bank
from moe_merge_nb.rewrites.group import merge_groups
from moe_merge_nb.rewrites.msmoe import n_stored_parameters
from moe_merge_nb.rewrites.task_vectors import dare, dare_ties
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.study.watch import Watch, watched

def a_layer(tower='image', block=0, n=4, **kinds):
    "Experts that have moved from their common start, the same in every block"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moe = MoE(tower, block, 8, Experts(n_experts=n, rank=3, shared_init=True, **kinds))
        moe.add_task()
        for p in moe.experts.parameters(): p.data += torch.randn_like(p)
    return moe

def written(rule, counts=(9, 7, 5, 1), tower='image', block=0, **when):
    "The expert that a merge writes, in one row"
    moe = a_layer(tower, block)
    event = merge_once(moe, torch.tensor(counts), rule, **when)
    return torch.cat([p.detach().flatten() for p in moe.experts[event['target']].parameters()])

# where a merge is

@pytest.mark.parametrize('name', ['dare', 'dare_ties'])
def test_masks_are_drawn_by_tower_block_and_task_and_not_by_counts(name):
    rule = Merge(combine=name)
    first = written(rule, task=0)
    assert torch.equal(first, written(rule, task=0)) and torch.equal(first, written(rule, (900, 80, 7, 6), task=0))
    others = [written(rule, tower='text', task=0), written(rule, block=1, task=0), written(rule, task=1)]
    for other in (*others, written(rule, task=0, turn=40)): assert not torch.equal(first, other)
    assert not torch.equal(others[0], others[1])

def test_in_a_run_every_block_has_its_own_mask(monkeypatch):
    seen = []
    def look(states, counts, base, where=None):
        seen.append(where)
        return mean(states)
    method = Method('m', experts=Experts(n_experts=4, rank=2, shared_init=True), merge=Merge(every=2, combine=look),
                    train=Train(iterations=4, batch=8, warmup=1, lr=1e-2))
    run(toy_stream(2), method, progress=False)
    seen = seen[1:]                                                             # the first is the trial before the run
    assert len(set(seen)) == len(seen) and {w.tower for w in seen} == {'image', 'text'}
    assert {w.task for w in seen} == {0, 1} and {w.turn for w in seen} == {2}
    assert len({w.block for w in seen if w.tower == 'image'}) == 4

def test_groups_of_a_rewrite_have_their_own_masks():
    b = bank(a_layer(n=4))
    b.states[2:] = b.states[:2]
    counts = torch.tensor([5, 4, 5, 4])
    for combine in (dare, dare_ties):
        first, second = merge_groups(b, counts, [[0, 1], [2, 3]], combine).states
        assert not torch.equal(first['up.weight'], second['up.weight'])

def drawing(states, counts, base):
    "Draws from all three"
    noise = torch.rand(()).item() + np.random.rand() + random.random()
    return {n: t + noise for n, t in mean(states).items()}

def test_what_a_rule_draws_depends_on_the_place_alone_and_leaves_no_trace():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = written(Merge(combine=drawing), task=0)
    after = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    np.random.seed(5), random.seed(5)
    assert torch.equal(first, written(Merge(combine=drawing), task=0))
    assert not torch.equal(first, written(Merge(combine=drawing), block=1, task=0))

def test_stored_rows_are_counted_with_their_numbers():
    "Rank 16 of width 128: q = 3; 4 rows of 16 and 32 of 128 are kept"
    moe = MoE('image', 0, 128, Experts(n_experts=1, top_k=1, rank=16))
    moe.add_task()
    b = bank(moe)
    factors, rows, biases = 2 * 3 * (16 + 128), 4 * 128 + 32 * 16, 16 + 128
    assert n_stored_parameters([b]) == factors + rows + biases + 4 + 32
    assert n_stored_parameters([b], ratio=0., keep=1.) == 2 * 16 * 128 + biases      # all rows: nothing to say
    assert n_stored_parameters([b], ratio=.15, keep=0.) == factors + biases

# merges that could never happen

QUICK = ['method=moe_merge', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'train.iterations=4', 'train.warmup=1',
         'train.batch=8', 'experts.rank=2']

REFUSED = {
    'n_sources': (['experts.n_experts=4', 'merge.n_sources=5'], 'merge.n_sources is 5.*4 experts'),
    'no target': (['experts.n_experts=4', 'merge.n_sources=4'], 'merge.n_sources is 4.*4 experts'),
    'one expert': (['experts.n_experts=1', 'experts.top_k=1'], 'merge.n_sources is 2.*1 experts'),
    'no expert': (['experts.n_experts=0'], 'experts.n_experts is 0'),
    'until': (['merge.every=4'], 'merge.every is 4.*merge.until'),
    'until, by itself': (['merge.until=0.1'], 'merge.until'),
    'all shared': (['experts.shared_blocks=4'], 'experts.shared_blocks is 4'),
    'nothing frozen': (['merge.every=0', 'merge.start=pairs', 'freeze=null'], 'merge.start.*freeze'),
    'none frozen': (['merge.every=0', 'merge.start=pairs', 'freeze.n=0'], 'merge.start.*freeze'),
    'one task': (['merge.every=0', 'merge.start=merged', 'stream.n_tasks=1'], 'merge.start.*1 task'),
    'top_k': (['experts.n_experts=3', 'experts.top_k=4'], 'experts.top_k is 4'),
    'ties': (['merge.combine=ties', 'experts.n_experts=6'], 'merge.combine=.ties.*experts.shared_init'),
    'ties, aligned': (['merge.combine=ties', 'experts.shared_init=true', 'merge.align=true'], 'merge.align=false'),
}

@pytest.mark.parametrize('what', REFUSED)
def test_merges_that_could_never_happen_are_refused_by_field(what, tmp_path):
    "Before training, and before the directory is touched"
    settings, says = REFUSED[what]
    with pytest.raises(UsageError, match=says): job(composed(*QUICK, *settings), str(tmp_path/'run'), progress=False)
    assert not (tmp_path/'run').exists()

def test_the_smallest_that_can_be_merged_is_and_what_cannot_be_known_is_a_warning():
    result = job(composed(*QUICK, 'experts.n_experts=3', 'train.batch=24', 'selectors=[oracle]'), progress=False)
    assert 'merge' in [e['kind'] for e in result.events]
    with pytest.raises(ValueError, match='merge is .*only experts'):
        Method('m', tune='backbone', experts=None, freeze=None, merge=Merge())
    def one(logits): return torch.nn.functional.one_hot(torch.zeros(len(logits)).long(), logits.shape[1]) + 0. * logits
    method = Method('m', experts=Experts(n_experts=4, rank=2, gate=one), merge=Merge(every=2),
                    train=Train(iterations=4, batch=8, warmup=1))
    with pytest.warns(UserWarning, match='squares.*7 times there was no merge, and never one .*1 of 2 sources'):
        run(toy_stream(1), method, progress=False)

# rules that go wrong

def broken(what):
    def rule(states, counts, base):
        state = mean(states)
        if len(state['down.bias']) == 3 or what == 'always': return {                   # not in the trial, on width 8
            'NaN': state | {'up.bias': state['up.bias'] * torch.nan},
            'infinity': state | {'down.weight': state['down.weight'] / 0},
            'shape': state | {'up.bias': state['up.bias'][:2]},
            'type': state | {'up.bias': state['up.bias'].double()},
            'whole': state | {'up.bias': state['up.bias'].int()},
            'missing': {n: t for n, t in state.items() if n != 'up.bias'},
            'extra': state | {'more': state['up.bias']},
            'list': list(state.values()),
            'none': None,
            'number': state | {'up.bias': 0.},
            'error': state,
        }[what] if what != 'error' else {n: state[n] for n in ('x',)}
        return state
    return rule

SAYS = {
    'NaN': "returned NaN or infinity in 'up.bias'", 'infinity': "returned NaN or infinity in 'down.weight'",
    'shape': r"'up.bias' is \(\(2,\)", 'type': "'up.bias' is .*float64", 'whole': "'up.bias' is .*int32",
    'missing': "'up.bias' is nothing", 'extra': "'more' is .*not there", 'list': 'a list', 'none': 'a NoneType',
    'number': "'up.bias' is <class 'float'>", 'error': 'failed with KeyError'}

@pytest.mark.parametrize('what', SAYS)
def test_a_rule_that_goes_wrong_is_named_where_it_happens(what):
    rule = Merge(combine=broken(what))
    says = f'merge.combine=.*{SAYS[what]}|merge.combine=.*text block 2 in task 2, iteration 40.*{SAYS[what]}'
    with pytest.raises(RuleFailed, match=says) as e: written(rule, tower='text', block=2, task=1, turn=40)
    assert 'text block 2 in task 2, iteration 40' in str(e.value)
    moe = a_layer()
    with pytest.raises(RuleFailed): merge_once(moe, torch.tensor([9, 7, 5, 1]), rule)
    assert torch.equal(moe.experts[3].up.bias, a_layer().experts[3].up.bias)    # nothing was written
    if what == 'NaN': assert 'up.bias' in says

@pytest.mark.parametrize('what', ['NaN', 'shape', 'list'])
def test_a_start_that_goes_wrong_is_named(what):
    moe = a_layer()
    moe.freeze([0, 1])
    def start(frozen, n, merge, new): return [] if what == 'list' else [broken(what)(frozen, None, None)]
    with pytest.raises(RuleFailed, match='merge.start=.*image block 0 in task 3'):
        start_merged(moe, Merge(start=start), task=2)
    with pytest.raises(RuleFailed, match='merge.combine=.*NaN'):
        start_merged(moe, Merge(start='pairs', combine=broken('NaN')), task=2)

def test_in_a_run_the_rule_is_named_and_not_an_image():
    "Only on what was learned: the trial before the run sees fresh experts, whose output weights are 0"
    def rule(states, counts, base):
        learned = any(s['up.weight'].any() for s in states)
        return {n: t * torch.nan if learned else t for n, t in mean(states).items()}
    method = Method('m', experts=Experts(n_experts=4, rank=2), merge=Merge(every=2, combine=rule),
                    train=Train(iterations=4, batch=8, warmup=1))
    with pytest.raises(RuleFailed, match='merge.combine=.*image block 0 in task 1, iteration 2.*returned NaN') as e:
        run(toy_stream(1), method, progress=False)
    assert 'images' not in str(e.value)

def test_a_rewrite_names_its_rule_too():
    with pytest.raises(RuleFailed, match="rule .image block 0.* returned NaN or infinity in 'up.bias'"):
        merge_groups(bank(a_layer()), torch.tensor([5, 4, 3, 2]), [[0, 1], [2, 3]], broken('NaN'))

def test_every_rule_of_ours_returns_experts_of_the_same_type():
    for name in COMBINE:
        moe = a_layer().double()
        assert merge_once(moe, torch.tensor([9, 7, 5, 1]), Merge(combine=name))['kind'] == 'merge'
    for name in COMBINE: check_rule(Merge(combine=name, n_sources=3), Experts(rank=2, shared_init=True))

# the watcher of Figure 1

def watching(rule, **method):
    "Rows of a watched training, and the merges of the same training without a watcher"
    m = Method('m', experts=Experts(n_experts=6, rank=2), merge=rule, selectors=('oracle',),
               train=Train(iterations=6, batch=8, warmup=1, lr=1e-2), **method)
    backbone, stream = load_clip('toy', 'random'), toy_stream(2, n_train=16, n_test=6)
    rows, model = watched(stream, m, 0, backbone)
    result = run(stream, m, 0, backbone, progress=False)
    return rows, model, result, m

@pytest.mark.parametrize('rule', [
    Merge(every=2, protect=True, window='task'), Merge(every=2, n_sources=3, frozen_sources=False)])
def test_the_watcher_sees_the_merges_that_happen(rule):
    rows, model, result, _ = watching(rule)
    merges = [e for e in result.events if e['kind'] == 'merge']
    for k, v in result.adapters.items(): torch.testing.assert_close(v, model.moes.state_dict()[k], rtol=0, atol=0)
    for who, of in [('target', lambda e: e['target']), *((f'source {i + 1}', lambda e, i=i: e['sources'][i])
                                                        for i in range(rule.n_sources))]:
        said = {(r['task'], r['iteration'], r['tower'], r['block'], r['expert'])
                for r in rows if r['measure'] == 'share before' and r['who'] == who}
        assert said == {(e['task'], e['iteration'], e['tower'], e['block'], of(e)) for e in merges}
    shares = {(r['task'], r['iteration'], r['tower'], r['block'], r['expert']): r['value']
              for r in rows if r['measure'] == 'share before' and r['who'] == 'source 1'}
    for e in merges:
        key = e['task'], e['iteration'], e['tower'], e['block'], e['sources'][0]
        assert shares[key] == pytest.approx(100 * e['counts'][e['sources'][0]] / sum(e['counts']), abs=1e-3)

def test_the_control_looks_at_what_the_rule_would_merge_and_changes_nothing():
    rule = Merge(every=2, protect=True, window='task')
    plain = Method('m', experts=Experts(n_experts=6, rank=2), train=Train(iterations=6, batch=8, warmup=1, lr=1e-2))
    backbone, stream = load_clip('toy', 'random'), toy_stream(2, n_train=16, n_test=6)
    model, watch = build(plain, backbone[0], 0), Watch(rule, merging=False)
    for j, task in enumerate(stream):
        model.add_task()
        train_task(model, task, j, backbone[1], settings=plain.train, callbacks=[watch, plain.freeze], seed=j,
                   clip=backbone[0], seen=stream.tasks[:j])
        if not j: protected = {k: set(v) for k, v in watch.merger.protected.items()}
    apart = run(stream, plain, 0, backbone, progress=False).adapters
    for k, v in apart.items(): assert torch.equal(v, model.moes.state_dict()[k])
    rows = [r for r in watch.rows if r['task'] == 'circles' and r['measure'] == 'share before']
    targets = [r for r in rows if r['who'] == 'target']
    assert protected and targets
    assert all(r['expert'] not in protected[r['tower'], r['block']] for r in targets)
