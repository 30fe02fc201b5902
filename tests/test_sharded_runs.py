"""Whole runs whose experts are shared out over processes: the numbers of one process, in parts of its memory."""
import sys
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch.utils.data import Subset
from moe_merge_nb.baselines.methods import method as known_method
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.layer.adapt import whole
from moe_merge_nb.layer.experts import read
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.learn import loop
from moe_merge_nb.learn.callbacks import FreezeMostUsed, MergeMostUsed
from moe_merge_nb.learn.evaluate import evaluate, images_of_process
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.method import Method, build
from moe_merge_nb.learn.sanity import bad_tensors
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.run import cli
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.safe.devices import has_memory, in_processes
from moe_merge_nb.select.select import Oracle
from moe_merge_nb.sharded.owners import by_load, in_turn, let_go
from moe_merge_nb.sharded.store import Shards
from moe_merge_nb.streams.tasks import Stream, toy_stream

E, TASKS = 8, 2
TABLES = 'matrix', 'selection', 'usage', 'fixed'

torch.manual_seed(0)
image = CLIPVisionCfg(image_size=32, patch_size=16, width=16, layers=2, head_width=8)
text = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=2)
BACKBONE = CLIP(16, image, text).eval().requires_grad_(False), pico_tokenizer()
TRAIN = Train(iterations=8, batch=8, lr=1e-2, warmup=2)


def method(sharded=True, **kw):
    "Merges with protection, and a selector."
    experts = Experts(n_experts=E, rank=4, dropout=0., sharded=sharded)
    usual = dict(experts=experts, train=TRAIN, merge=Merge(every=4, protect=True), selectors=('oracle', 'gaussian'))
    return Method('moe_merge', **{**usual, **kw})

def learned(directory, m, stream=None, **kw):
    "A run in this process, or its part of one in several."
    how = dict(progress=False, accelerator=Accelerator(cpu=True))
    return loop.run(stream or toy_stream(TASKS), m, 0, BACKBONE, directory, **how, **kw)

def furthest(a, b):
    "The largest difference of a number in two sets of tensors."
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


# ---- whole runs

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The run of one process, and of two: with all experts in each, or shared out, anew every three iterations."
    d = tmp_path_factory.mktemp('runs')
    def several(directory, m):
        Shards.every = 3
        learned(directory, m)
    learned(d/'one', method(False))
    learned(d/'one sharded', method())
    in_processes(several, d/'two', method(False))
    in_processes(several, d/'two sharded', method())
    return {name: load_result(d/name, adapters=True) for name in ('one', 'one sharded', 'two', 'two sharded')}

def test_a_sharded_run_ends_with_the_numbers_of_one_process(runs):
    one, ours = runs['one'], runs['two sharded']
    for name in TABLES: assert getattr(ours, name).equals(getattr(one, name)), name
    assert ours.events == one.events and {'merge', 'freeze'} <= {e['kind'] for e in ours.events}
    assert furthest(one.adapters, ours.adapters) < 1e-5

def test_it_ends_with_every_bit_of_as_many_processes_that_are_not_sharded(runs):
    assert furthest(runs['two'].adapters, runs['two sharded'].adapters) == 0

def test_in_one_process_it_is_the_same_run(runs):
    one, ours = runs['one'], runs['one sharded']
    assert furthest(one.adapters, ours.adapters) == 0 and ours.events == one.events
    assert ours.config['experts']['sharded'] and not one.config['experts']['sharded']


# ---- one task, looked into

class First(Callback):
    "The gradients of the first iteration, by the names of their parameters."
    def after_step(self, learner):
        if learner.iteration > 1: return
        named = learner.model.moes.named_parameters()
        self.grads = {n: p.grad.clone() for n, p in named if p.grad is not None}

def task_learned(accelerator):
    "A model after one task, its learner, the gradients of its first iteration."
    model, first = build(method(), BACKBONE[0], 0), First()
    Shards.keep(model, accelerator)
    if isinstance(model.store, Shards): model.store.every = 4
    callbacks = [first, MergeMostUsed(Merge(every=4)), FreezeMostUsed(2)]
    known = dict(settings=TRAIN, callbacks=callbacks, accelerator=accelerator)
    model.add_task(seed=0)
    return model, train_task(model, toy_stream(1)[0], 0, BACKBONE[1], **known), first.grads

def bytes_of(model, optimizer):
    "What a process holds for experts: weights, gradients, moments."
    ps = list(p for moe in model.moes for p in moe.experts.parameters())
    states = [t for p in ps if p in optimizer.state for name, t in optimizer.state[p].items() if name != 'step']
    held = dict(weights=[p for p in ps if has_memory(p)], grads=[p.grad for p in ps if p.grad is not None])
    return {name: sum(t.nbytes for t in ts) for name, ts in {**held, 'moments': states}.items()}

def merged_by_hand(model):
    "A merge of the first layer, whose sources and target lie in both processes; its event and the expert that it made."
    counts = torch.tensor([0, 9, 8, 1, 5, 5, 5, 5])
    model.moes[0].frozen[:] = False
    event = merge_once(model.moes[0], counts, Merge())
    with model.moes[0].store.at_hand(model.moes[0], [0]): return event, read(model.moes[0].experts[0])

def three_tasks():
    "The last one has a single test image: one process has none, and is through before the other."
    a, b, c = toy_stream(3)
    return Stream('toy', (a, b, replace(c, test=Subset(c.test, [5]))))

def evaluated(model, accelerator):
    "All tables of an evaluation, with an answer of plain CLIP among them."
    picks = dict(oracle=Oracle().fit(None))
    row = evaluate(model, BACKBONE[1], three_tasks(), picks, after='x', progress=False, accelerator=accelerator)
    return row.matrix.to_csv(), row.selection.to_csv(), row.passes['images_naive']

def looked_into(path):
    "What each process saw of its task."
    accelerator = Accelerator(cpu=True)
    model, learner, grads = task_learned(accelerator)
    store, held = model.store, bytes_of(model, learner.optimizer)
    with whole(model, here=accelerator.is_main_process):
        names = list(dict(model.moes.named_parameters()))
        state = {k: v.clone() for k, v in model.moes.state_dict().items()}
    found = dict(grads=grads, held=held, names=names, state=state, sent=dict(getattr(store, 'sent', {})))
    found |= dict(owner=getattr(store, 'owner', None), bad=bad_tensors(model), merged=merged_by_hand(model))
    found |= dict(evaluated=evaluated(model, accelerator), counts=learner.counts(), events=learner.events)
    found |= dict(guests=getattr(store, 'guests', []), after=bytes_of(model, learner.optimizer)['weights'])
    torch.save(found, path/f'{accelerator.process_index}.pt')

@pytest.fixture(scope='module')
def ends(tmp_path_factory):
    "One process, then each of two."
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    looked_into(one)
    in_processes(looked_into, two)
    return [torch.load(p) for p in (one/'0.pt', two/'0.pt', two/'1.pt')]

def owner_of(name, owner):
    "Of the expert that a parameter belongs to; None for a router's."
    layer, part, e, *_ = name.split('.')
    return owner[int(layer)][int(e)] if part == 'experts' else None

def test_gradients_are_those_of_one_process_and_lie_with_the_owners(ends):
    one, *two = ends
    for me, end in enumerate(two):
        at_first = in_turn([E] * 4, 2)
        wanted = {n: g for n, g in one['grads'].items() if owner_of(n, at_first) in (None, me)}
        assert len(wanted) > 10 and furthest(wanted, end['grads']) <= 1e-6

def test_each_process_holds_its_part_of_weights_gradients_and_moments(ends):
    one, *two = ends
    for what in ('weights', 'grads', 'moments'): assert sum(end['held'][what] for end in two) == one['held'][what]
    assert [end['held']['weights'] / one['held']['weights'] for end in two] == [.5, .5]
    assert [end['held']['moments'] / one['held']['moments'] for end in two] == pytest.approx([.5, .5], abs=.1)

def test_the_planner_dealt_experts_out_anew_and_moments_moved_with_them(ends):
    _, first, second = ends
    assert first['owner'] == second['owner'] != in_turn([E] * 4, 2)
    for tower in (first['owner'][:2], first['owner'][2:]): assert sorted(sum(tower, [])) == [0] * E + [1] * E
    moved, numbers = first['sent']['moved'] + second['sent']['moved'], 2*16*4 + 16 + 4
    assert moved % 4 == 0 and moved > 2 * 3 * 4 * numbers                   # at least two, with both moments

def test_nothing_that_came_for_a_while_stays(ends):
    for end in ends[1:]: assert end['guests'] == [set()] * 4 and end['after'] == end['held']['weights']

def test_the_first_process_can_have_all_to_save_it(ends):
    one, first, second = ends
    assert furthest(one['state'], first['state']) < 1e-5
    absent = {k for k, v in second['state'].items() if v.is_floating_point() and v.isnan().any()}
    assert absent == {n for n in second['names'] if owner_of(n, second['owner']) == 0}
    assert first['bad'] == second['bad'] == []                              # each looks at what it has

def test_a_merge_joins_experts_of_both_processes(ends):
    one, first, second = ends
    event = first['merged'][0]
    assert event['sources'] == [1, 2] and event['target'] == 0
    assert {first['owner'][0][e] for e in (1, 2)} == {0, 1}
    for end in (first, second):
        assert end['merged'][0] == event == one['merged'][0] and furthest(end['merged'][1], one['merged'][1]) < 1e-5

def test_processes_with_other_images_get_the_experts_that_they_ask_for(ends):
    assert ends[0]['evaluated'] == ends[1]['evaluated'] == ends[2]['evaluated']
    assert ends[0]['events'] == ends[1]['events'] == ends[2]['events']
    for key, c in ends[0]['counts'].items(): assert (c == ends[1]['counts'][key]).all()

def test_a_process_may_be_without_images():
    parts = [images_of_process(2, SimpleNamespace(process_index=i, num_processes=4)).tolist() for i in range(4)]
    assert parts == [[0], [1], [], []]

def test_what_is_sent_is_less_than_with_all_experts_in_every_step(ends):
    everything = ends[0]['held']['weights'] * TRAIN.iterations              # 2 (D - 1)/D S with D = 2
    for end in ends[1:]:
        sent = end['sent']
        assert 0 < sent['gathered'] + sent['scattered'] < everything
        rows = 2 * 16 * 4 + 16 + 4                                          # numbers of an expert
        assert sent['gathered'] % (4 * rows) == 0 and sent['scattered'] % 4 == 0


# ---- interrupted runs

class Stop(Exception): pass

def broken_off(directory, m, at):
    "A run that ends before an iteration of its second task."
    class Pull(Callback):
        def loss(self, learner, images, labels):
            if (learner.index, learner.iteration) == (1, at): raise Stop
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, 'Progress', lambda shown: Pull())               # it only watches
        learned(directory, m, save_every=4)

def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    m, silent = method(), pytest.warns(UserWarning, match='another program or machine')
    in_processes(broken_off, tmp_path/'a', m, 0)
    with silent: learned(tmp_path/'a', m)                                   # two, then one
    broken_off(tmp_path/'b', m, 6)                                          # in the middle of a task
    in_processes(learned, tmp_path/'b', m)                                  # one, then two
    for name in 'ab':
        found = load_result(tmp_path/name, adapters=True)
        for table in TABLES: assert getattr(found, table).equals(getattr(runs['one'], table)), table
        assert found.events == runs['one'].events and furthest(found.adapters, runs['one'].adapters) < 1e-5


# ---- the command line

def test_the_command_line_shares_experts_out(tmp_path):
    said = ['stream=toy', 'stream.n_tasks=2', 'model=toy', 'method=moe_merge', 'selectors=[oracle]',
            'train.iterations=4', 'train.warmup=1', 'train.batch=4', 'merge.every=2',
            'experts.n_experts=4', 'experts.rank=2', 'experts.dropout=0']
    def line(name, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['moe-merge', *said, *more, f'hydra.run.dir={tmp_path/name}'])
            assert cli.main() in (None, 0)
    line('one')
    in_processes(line, 'two', 'experts.sharded=true')
    one, two = (load_result(tmp_path/name, adapters=True) for name in ('one', 'two'))
    assert one.matrix.equals(two.matrix) and one.usage.equals(two.usage) and one.events == two.events
    assert two.config['processes'] == 2 and two.config['experts']['sharded']
    assert furthest(one.adapters, two.adapters) < 1e-4

class Twins(torch.nn.Module):
    "An expert that holds more than parameters."
    def __init__(self, width, rank):
        super().__init__()
        self.up = torch.nn.Linear(width, width)
        torch.nn.init.zeros_(self.up.weight), torch.nn.init.zeros_(self.up.bias)
        self.register_buffer('seen', torch.zeros(1))
    def forward(self, x): return self.up(x)

REFUSED = {
    "experts.mix='chain'.*choose experts.mix=once, or experts.sharded=false":
        replace(known_method('chain'), experts=replace(known_method('chain').experts, sharded=True)),
    'baseline=.*choose baseline=null, or experts.sharded=false':
        replace(known_method('home'), experts=replace(known_method('moe').experts, sharded=True)),
    "train.precision='fp16'.*choose bf16 or fp32": method(train=replace(TRAIN, precision='fp16')),
    'experts.expert=.*it has buffers':
        method(merge=None, experts=Experts(n_experts=E, rank=4, expert=Twins, sharded=True))}

@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_shared_out_is_refused_before_any_work(message, tmp_path):
    experts = {k: v for k, v in vars(REFUSED[message]).items() if k != 'name'}
    m = Method('own', **experts)
    with pytest.raises(ValueError, match=f'experts.sharded is true with {message}'): learned(tmp_path/'x', m)
    assert not (tmp_path/'x').exists()

def test_the_command_line_refuses_it_as_well(tmp_path):
    cfg = composed('stream=toy', 'model=toy', 'method=chain', 'experts.sharded=true')
    with pytest.raises(UsageError, match='choose experts.mix=once, or experts.sharded=false'):
        job(cfg, str(tmp_path/'x'))


# ---- owners

def test_all_own_the_same_number_up_to_one():
    owner = in_turn([4, 1, 3, 1], 2)
    assert owner == [[0, 1, 0, 1], [0], [1, 0, 1], [0]]
    counts = [torch.tensor(c) for c in ([9, 0, 9, 0], [0, 9, 0, 9], [5, 5], [7, 1])]
    dealt = by_load(counts, [10, 10, 20, 20], 2)
    assert [len(o) for o in dealt] == [4, 4, 2, 2]
    assert sorted(sum(dealt, [])) == [0] * 6 + [1] * 6
    assert dealt[0][0] != dealt[0][2] and dealt[1][1] != dealt[1][3]        # favourites of a block live apart

def test_an_expert_that_is_elsewhere_is_read_as_nan_and_cannot_be_written():
    model = build(method(), BACKBONE[0], 0)
    expert = model.moes[0].experts[0]
    let_go(expert)
    assert expert(torch.ones(1, 16)).isnan().all() and expert.up.weight.untyped_storage().nbytes() == 4
    with pytest.raises(RuntimeError), torch.no_grad(): expert.up.weight.copy_(torch.ones(16, 4))
