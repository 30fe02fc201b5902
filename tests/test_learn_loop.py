from dataclasses import replace
from functools import cache
import pytest, torch
from accelerate import Accelerator
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import *
from moe_merge_nb.merge.combine import *
from moe_merge_nb.merge.align import *
from moe_merge_nb.merge.rule import *
from moe_merge_nb.merge.start import *
from moe_merge_nb.learn.train import *
from moe_merge_nb.learn.evaluate import *
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.learn.results import *
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.callbacks import *
from moe_merge_nb.learn.method import *
from moe_merge_nb.safe.checkpoint import write_tree
from moe_merge_nb.safe.guard import *
from moe_merge_nb.learn.state import *
from moe_merge_nb.learn.recover import *
from moe_merge_nb.learn.loop import *
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.clip.backbone import pico_tokenizer
torch.manual_seed(0)
image = CLIPVisionCfg(image_size=32, patch_size=16, width=16, layers=1, head_width=8)
text = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=1)
backbone = CLIP(16, image, text).eval().requires_grad_(False), pico_tokenizer()
EVERY = 'oracle', 'gaussian', 'autoencoder', 'text'
quick = Train(iterations=8, batch=8, lr=1e-2, warmup=2)
from moe_merge_nb.learn import loop # tests patch names of the module
def small(name='moe_merge', **kw):
    "A method that runs in half a second."
    usual = dict(experts=dict(n_experts=6, rank=4), train=quick, merge=Merge(every=4), selectors=('oracle', 'gaussian'))
    return Method(name, **{**usual, **kw})
def shortened(m, iterations, **kw):
    "A method of the configuration with four experts at most and batches of four images."
    few = m.experts and replace(m.experts, n_experts=min(4, m.experts.n_experts), rank=2)
    return replace(m, train=replace(m.train, iterations=iterations, warmup=1, batch=4), experts=few, **kw)
def learned(method=None, n_tasks=2, seed=0, **kw):
    "What a method makes of the toy stream."
    return loop.run(toy_stream(n_tasks), method or small(), seed, backbone, progress=False, **kw)
@cache
def undisturbed():
    "The small method's run."
    return learned()
@cache
def of_three_tasks():
    "The same method's, with every selector."
    return learned(small(selectors=EVERY), 3)
@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The small method's run, and where it is saved."
    d = str(tmp_path_factory.mktemp('finished'))
    return learned(directory=d), d
@cache
def method_learned(name):
    "What the method of that name, shortened, makes of it."
    return learned(of_configuration(name))
def of_configuration(name):
    "A method of the configuration, shortened: ZSCL sees few images of others, and often."
    m = METHODS[name]
    short = shortened(m, 4, merge=m.merge and Merge(every=2), selectors=m.selectors[:2])
    return replace(short, baseline=replace(m.baseline, every=2, l2=.1, n=64, batch=8)) if name == 'zscl' else short
def plainly(name, tune, **kw):
    "A method without adapters."
    return Method(name, tune=tune, experts=None, selectors=('none',), **kw)
@cache
def zero_shot():
    "What plain CLIP makes of it."
    return learned(plainly('zero_shot', 'nothing'))
from pathlib import Path
from unittest.mock import patch
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.learn import state
class PullThePlug(Callback):
    "Interrupts the run in its second task, once."
    def __init__(self, flag, act, at=6): self.flag, self.act, self.at = Path(flag), act, (1, at)
    def loss(self, learner, images, labels):
        if (learner.index, learner.iteration) != self.at or self.flag.exists(): return
        self.flag.touch()
        self.act()
def joined(callback):
    "Methods whose callbacks are joined by one more."
    real = state.callbacks
    return patch.object(state, 'callbacks', lambda method: [*real(method), callback])
def plugged(flag, act, at=6): return joined(PullThePlug(flag, act, at))
def pull(): raise MemoryError
def same(a, b):
    "Are the two results equal, bit for bit?"
    for name in ('matrix', 'selection', 'usage', 'fixed'):
        assert getattr(a, name).astype(str).equals(getattr(b, name).astype(str)), name
    assert a.events == b.events
    assert all(torch.equal(t, b.adapters[k]) for k, t in (a.adapters or {}).items())
def iteration_saved(directory):
    "In which iteration of its task the run was saved last."
    from moe_merge_nb.safe.checkpoint import read_tree
    return read_tree(f'{directory}/checkpoint.safetensors')['snapshot']['task']['iteration']
def never_begun():
    "No run may begin."
    return patch.object(loop, 'start', side_effect=AssertionError('a run was begun'))
def made(folder, name=None):
    "A run of this process, written to a file with its name, or with its rank."
    cpu = Accelerator(cpu=True)
    r = learned(small(experts=dict(n_experts=6, rank=4, dropout=0.)), accelerator=cpu)
    tables = {n: getattr(r, n).to_dict('list') for n in ('matrix', 'selection', 'usage', 'fixed')}
    left = dict(adapters=r.adapters, events=r.events, tables=tables, processes=r.config['processes'])
    write_tree(left, f'{folder}/{name or cpu.process_index}.safetensors')


def test_the_same_seed_gives_the_same_run_and_another_does_not():
    a, b, c = undisturbed(), learned(seed=0), learned(seed=1)
    assert a.matrix.equals(b.matrix) and a.usage.equals(b.usage) and a.events == b.events
    assert all(torch.equal(t, b.adapters[k]) for k, t in a.adapters.items())
    assert not a.usage.equals(c.usage)


def test_zero_shot_is_the_same_row_every_time():
    r = zero_shot()
    A = accuracy_matrix(r, 'none')
    assert (A[0] == A[1]).all() and r.adapters is None


def test_with_the_oracle_unseen_tasks_are_at_zero_shot_level_exactly():
    A = accuracy_matrix(undisturbed(), 'oracle')
    assert A[0, 1] == accuracy_matrix(zero_shot(), 'none')[0, 1]


def test_fine_tuning_changes_its_own_copy_and_nothing_else():
    before = {n: p.clone() for n, p in backbone[0].named_parameters()}
    r = learned(plainly('ft', 'backbone', train=quick))
    assert all(torch.equal(p, before[n]) for n, p in backbone[0].named_parameters())
    assert r.usage.empty and not r.events


def test_a_run_is_saved_after_every_task_and_reads_back(finished):
    r, d = finished
    back = load_result(d, adapters=True)
    assert back.config['seed'] == 0 and back.config['merge']['every'] == 4 and len(back.events) == len(r.events)
    assert (accuracy_matrix(back, 'oracle') == accuracy_matrix(r, 'oracle')).all()
    assert back.adapters.keys() == r.adapters.keys()


def test_an_interrupted_run_goes_on_where_it_stopped():
    import os, signal, tempfile
    method = small(merge=Merge(every=4, protect=True), selectors=EVERY)
    cases = (signal.SIGINT, method, 3, learned(method, 3)), (signal.SIGTERM, small(), 2, undisturbed())
    for number, method, n, straight in cases:
        says = f'stopped in task 2 of {n}; the same command goes on from'
        with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', lambda: os.kill(os.getpid(), number)):
            with pytest.raises(Stopped, match=says) as e: learned(method, n, directory=f'{d}/run')
            assert e.value.number == number and signal.getsignal(number) is not None
            assert iteration_saved(f'{d}/run') == 7 # after the iteration in hand
            resumed = learned(method, n, directory=f'{d}/run')
            assert not list(Path(d, 'run').glob('checkpoint*'))
            assert load_result(f'{d}/run').timings == resumed.timings
        same(resumed, straight)


def test_every_method_goes_on_in_the_middle_of_a_task():
    import tempfile
    for m in METHODS.values():
        if m.tune == 'nothing' or m.name in ('adapter', 'moe'): continue
        short, straight = of_configuration(m.name), method_learned(m.name)
        with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', pull, 3):
            with pytest.raises(MemoryError): learned(short, directory=f'{d}/run', save_every=3)
            assert iteration_saved(f'{d}/run') == 3, m.name
            same(learned(short, directory=f'{d}/run'), straight)


def test_asked_to_end_in_evaluation_a_run_ends_at_once_and_does_not_train_again():
    import os, signal, tempfile
    straight = undisturbed()
    def interrupted(*args, **kw):
        os.kill(os.getpid(), signal.SIGTERM)
        assert False, 'it went on'
    def trained(*args, **kw): assert False, 'it was trained again'
    with tempfile.TemporaryDirectory() as d:
        with patch.object(loop, 'evaluate', interrupted):
            with pytest.raises(Stopped): learned(directory=d)
            with patch.object(loop, 'train_task', trained), pytest.raises(Stopped): learned(directory=d)
        same(learned(directory=d), straight)


def test_a_finished_run_is_read_and_not_done_again(finished):
    a, d = finished
    with never_begun(): b = learned(directory=d)
    same(b, a)
    assert b.config['seconds'] == a.config['seconds'] > 0
    with pytest.raises(NotThisRun, match='holds a run with another seed .0, not 1.'): learned(seed=1, directory=d)


def test_both_label_spaces_are_evaluated_and_belong_to_the_run():
    import json, tempfile
    both, plain = small(classes=('task', 'all')), undisturbed()
    with tempfile.TemporaryDirectory() as d:
        r = learned(both, directory=d)
        with never_begun(): same(learned(both, directory=d), r)
        with pytest.raises(NotThisRun, match='another classes'): learned(directory=d)
    assert selectors(r) == ['oracle', 'gaussian', 'oracle all', 'gaussian all']
    assert r.config['classes'] == ('task', 'all')
    own = r.matrix[~r.matrix.selector.str.endswith(' all')]
    assert own.to_csv(index=False) == plain.matrix.to_csv(index=False)
    assert r.selection.to_csv() == plain.selection.to_csv()
    for x in ('oracle', 'gaussian'): assert (accuracy_matrix(r, f'{x} all') <= accuracy_matrix(r, x)).all()


def test_a_checkpoint_of_other_settings_is_not_continued_and_not_lost():
    import tempfile
    from moe_merge_nb.safe.checkpoint import read_newest, write_newest
    with tempfile.TemporaryDirectory() as d:
        path = f'{d}/{CHECKPOINT}'
        write_newest(dict(version=VERSION, plan=dict(seed=7, data_sha256={}), done=1), path)
        with pytest.raises(NotThisRun, match='holds a run with another'): learned(directory=d)
        assert read_newest(path)['done'] == 1


def test_a_damaged_checkpoint_costs_some_iterations_and_nothing_else():
    import tempfile
    straight = undisturbed()
    says = 'checkpoint.safetensors is no checkpoint, or damaged.*checkpoint.before.safetensors'
    for ruin in (lambda b: b[:-9], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]):
        with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', pull):
            with pytest.raises(MemoryError): learned(directory=f'{d}/run', save_every=2)
            path = Path(d, 'run', CHECKPOINT)
            path.write_bytes(ruin(path.read_bytes()))
            with pytest.warns(UserWarning, match=says): resumed = learned(directory=f'{d}/run')
        same(resumed, straight)


def test_the_disk_is_full_in_the_middle_and_the_run_goes_on_later():
    import errno, os, tempfile
    straight, real = undisturbed(), os.fsync
    def runs_full(n):
        "A disk on which `n` writes succeed."
        left = [n]
        def fsync(fd):
            left[0] -= 1
            if left[0] < 0: raise OSError(errno.ENOSPC, 'No space left on device')
            real(fd)
        return patch('moe_merge_nb.safe.files.os.fsync', fsync)
    says = 'No space left on device.*the same command goes on'
    for n in (4, 9, 16): # in the first task, in the second, in the tables
        with tempfile.TemporaryDirectory() as d:
            with runs_full(n), pytest.raises(OSError, match=says) as e: learned(directory=d, save_every=3)
            assert d in str(e.value)
            same(learned(directory=d), straight)


def test_a_directory_that_cannot_be_written_to_is_found_out_before_training():
    import errno, tempfile
    denied = patch('moe_merge_nb.safe.files.os.replace', side_effect=PermissionError(errno.EACCES, 'Permission denied'))
    with tempfile.TemporaryDirectory() as d, denied, never_begun():
        with pytest.raises(PermissionError, match=d): learned(n_tasks=1, directory=d)


def test_a_run_directory_that_vanishes_is_made_again():
    import shutil, tempfile
    with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', lambda: shutil.rmtree(f'{d}/run')):
        same(learned(directory=f'{d}/run', save_every=2), undisturbed())
        assert load_result(f'{d}/run').matrix.after.nunique() == 2


def test_two_runs_do_not_share_a_directory():
    import tempfile
    from filelock import FileLock
    with tempfile.TemporaryDirectory() as d, FileLock(f'{d}/.lock'):
        with pytest.raises(InUse, match='is in use by another process'): learned(n_tasks=1, directory=d)


def test_a_loss_that_is_no_number_ends_the_run_with_the_state_before_it():
    import tempfile
    class Explode(Callback):
        def __init__(self, value): self.value = value
        def loss(self, learner, images, labels):
            return torch.tensor(self.value if (learner.index, learner.iteration) == (1, 5) else 0.)
    says = "the loss is nan in iteration 6 of task 'circles', at learning rate"
    with tempfile.TemporaryDirectory() as d:
        with joined(Explode(float('nan'))), pytest.raises(FloatingPointError, match=says): learned(directory=d)
        assert iteration_saved(d) == 5
        with joined(Explode(0.)): same(learned(directory=d), undisturbed())


def test_a_callback_of_ones_own_is_continued_from_the_beginning_of_its_task():
    import tempfile
    import sys
    from pathlib import Path
    folder = tempfile.mkdtemp()
    lines = [
        'from moe_merge_nb.learn.callbacks import FreezeMostUsed', 'class Watches(FreezeMostUsed):',
        '    def after_step(self, learner): pass']
    Path(folder, 'watches_of_a_test.py').write_text('\n'.join(lines))
    sys.path.insert(0, folder)
    from watches_of_a_test import Watches
    method, says = small(freeze=Watches()), ".'Watches'. cannot be continued in the middle of a task"
    with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', pull):
        with pytest.warns(UserWarning, match=says), pytest.raises(MemoryError):
            learned(method, directory=f'{d}/run', save_every=3)
        same(learned(method, directory=f'{d}/run'), learned(method))


def test_another_program_that_goes_on_is_told_so():
    import tempfile
    from moe_merge_nb.learn import plan
    real = plan.provenance
    newer = patch.object(plan, 'provenance', lambda device: {**real(device), 'torch': '9.9'})
    says = 'another program or machine .torch .* -> 9.9'
    with tempfile.TemporaryDirectory() as d, plugged(f'{d}/flag', pull):
        with pytest.raises(MemoryError): learned(directory=f'{d}/run')
        with newer, pytest.warns(UserWarning, match=says): learned(directory=f'{d}/run')


def test_two_processes_make_the_same_merges_and_weights_as_one():
    import tempfile
    from moe_merge_nb.safe.checkpoint import read_tree
    from moe_merge_nb.safe.devices import in_processes
    with tempfile.TemporaryDirectory() as d:
        made(d, 'one')
        in_processes(made, d)
        one, first, second = (read_tree(f'{d}/{n}.safetensors') for n in ('one', 0, 1))
    assert [r['processes'] for r in (one, first, second)] == [1, 2, 2]
    assert one['events'] == first['events'] == second['events']
    assert sum(e['kind'] == 'merge' for e in one['events']) == 2 * 2
    assert one['tables'] == first['tables'] == second['tables']
    assert all(torch.equal(t, second['adapters'][k]) for k, t in first['adapters'].items())
    for k, t in one['adapters'].items(): assert (t.double() - first['adapters'][k].double()).abs().max() < 1e-4


def test_with_and_without_a_cache_the_matrix_is_the_same():
    method = small(selectors=EVERY)
    on, off = of_three_tasks(), learned(method, 3, cache_mb=0)
    assert on.matrix.equals(off.matrix) and on.selection.equals(off.selection)
    assert any(e['kind'] == 'merge' for e in on.events)
    def spent(r, what): return sum(t[what] for t in r.timings.values())
    naive = spent(on, 'images_naive')
    assert spent(on, 'images') <= naive / 2 and spent(on, 'images') < spent(off, 'images') < naive
    assert spent(on, 'prompts') < spent(off, 'prompts')
    with pytest.raises(ValueError, match='cache_mb is -1'): learned(method, 1, cache_mb=-1)


def test_every_method_of_the_configuration_learns_the_toy_stream():
    for name, m in METHODS.items():
        assert accuracy_matrix(method_learned(name), m.selectors[0]).shape == (2, 2), name


def test_two_experts_at_most_are_fixed_per_block_and_task():
    r = of_three_tasks()
    per = r.fixed.groupby(['after', 'tower', 'block']).expert.nunique()
    assert len(per) == 3 * 2 and (per == 2).all()
