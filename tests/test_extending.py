"""A finished run learns further tasks: what comes out is what learning all of them at once would have given."""
import unicodedata
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch
import numpy as np
import pytest
import torch
from PIL import Image
from moe_merge_nb.baselines.methods import method as named
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn import loop
from moe_merge_nb.learn.callbacks import FreezeMostUsed
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.pack import pack
from moe_merge_nb.learn.recover import NotThisRun
from moe_merge_nb.learn.results import accuracy_matrix, summary
from moe_merge_nb.learn.saved import load_result, save_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.extending import extend, extend_job
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import again, stream_of
from moe_merge_nb.run.runs import load_runs
from moe_merge_nb.run.share import load
from moe_merge_nb.streams.tasks import first, toy_stream
from toys import begin, end, killed

STREAM = toy_stream(n_tasks=5, n_train=8, n_test=4)
NEW = replace(STREAM, tasks=STREAM.tasks[3:])
FEW = dict(experts=dict(n_experts=12, rank=2), train=Train(iterations=2, batch=4))
METHODS = {
    'moe': Method('moe', classes=('task', 'all'), selectors=('oracle', 'gaussian'), **FEW),
    'moe_merge': Method('moe_merge', merge=Merge(every=1, until=1, protect=True), **FEW),
    'moe_copy': Method('moe_copy', merge=Merge(every=0, start='copy'), **FEW),
}
QUIET = dict(progress=False)
BACKBONE = dict(backbone=load_clip('toy', 'random'), config=dict(model='toy', pretrained='random'))

def learned(stream, method, *seed, **where):
    "A run of the smallest model, which is named in it."
    return run(stream, method, *seed, **BACKBONE, **where, **QUIET)

def equal(a, b):
    "Are two trees the same, to the bit?"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b

def rows(result, tasks=None):
    "The accuracies after the last two tasks, of `tasks` or all."
    m = result.matrix[result.matrix.after.isin(NEW.names)]
    m = m if tasks is None else m[m.task.isin(tasks)]
    return sorted(map(tuple, m.values.tolist()))

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Runs of three tasks, in directories."
    d = tmp_path_factory.mktemp('three')
    for name, method in METHODS.items(): learned(first(STREAM, 3), method, 7, directory=d/name)
    return d

@cache
def at_once(name): return learned(STREAM, METHODS[name], 7)

@pytest.fixture(scope='module')
def extended(three, tmp_path_factory):
    "moe, extended by two tasks whose predecessors cannot be tested."
    d = tmp_path_factory.mktemp('extended')/'run'
    extend(three/'moe', NEW, d, **QUIET)
    return d


# ---- the same as at once

@pytest.mark.parametrize('name', METHODS)
def test_three_tasks_and_two_more_are_five_at_once(name, three, tmp_path):
    source = dict(moe=three/'moe', moe_merge=load(three/'moe_merge').save(tmp_path/'x.safetensors'),
                  moe_copy=load_result(three/'moe_copy', adapters=True, selectors=True))[name]
    whole = at_once(name)
    more = extend(source, NEW, old=first(STREAM, 3), **QUIET)
    assert equal(whole.adapters, more.adapters) and equal(whole.selectors, more.selectors)
    assert whole.callbacks == more.callbacks
    assert rows(more) == rows(whole) and len(rows(more)) == len(more.matrix)
    assert [e for e in whole.events if e['task'] in NEW.names] == more.events
    assert more.config['tasks'] == STREAM.names and more.config['seed'] == 7
    if name == 'moe_merge': assert more.callbacks[0]['protected']
    else: return
    assert {e['kind'] for e in more.events} >= {'merge', 'freeze'}

def test_tasks_without_images_are_left_out_and_nothing_else_changes(three, extended):
    result, whole = load_result(extended, adapters=True, selectors=True), at_once('moe')
    assert equal(whole.adapters, result.adapters) and equal(whole.selectors, result.selectors)
    assert rows(result) == rows(whole, NEW.names) and set(result.matrix.task) == set(NEW.names)
    assert set(result.selection.task) == set(NEW.names) and list(result.timings) == NEW.names
    assert result.config['data_sha256'] == whole.config['data_sha256']


# ---- what is read off it

def test_metrics_are_about_the_tasks_that_are_there(extended):
    result = load_result(extended)
    A = accuracy_matrix(result, 'oracle')
    assert A.shape == (2, 2)
    table = summary(result).set_index('selector').loc['oracle']
    assert table.Transfer == A[0, 1] and table.Average == A.mean() and table.Last == A[1].mean()
    assert table.about == f'{", ".join(NEW.names)}; after {", ".join(NEW.names)}'

def test_with_old_images_old_tasks_have_columns_too(three):
    more = extend(three/'moe_copy', NEW, old=first(STREAM, 1), **QUIET)
    A, tested = accuracy_matrix(more, 'oracle'), [STREAM.names[0], *NEW.names]
    assert A.shape == (2, 3) and np.isfinite(A).all()
    assert more.config['extends']['evaluated'] == tested
    assert summary(more).set_index('selector').Transfer['oracle'] == A[0, 2] # the first was learned before both

def test_a_report_leaves_it_out_by_name(three, extended, capsys):
    [r] = load_runs([three/'moe', extended])
    assert r.config['tasks'] == STREAM.names[:3]
    assert f'it extends another run: {extended}' in capsys.readouterr().err
    with pytest.raises(ValueError, match='extends another'): load_runs([extended])
    result = load_result(extended)
    with pytest.raises(ValueError, match='extends another'): pack([result], extended.parent/'x.csv')
    for of in (again, stream_of):
        with pytest.raises(ValueError, match='extends another'): of(result.config)

def test_it_is_shared_and_extended_like_any_other(extended, tmp_path):
    shared = load(extended)
    assert [t.name for t in shared.tasks] == STREAM.names and shared.tasks[0].classes == STREAM[0].classes
    assert shared.selectors['gaussian'].n_tasks == 5
    [sixth] = toy_stream(n_tasks=6, n_train=8, n_test=4).tasks[5:]
    more = extend(shared.save(tmp_path/'x.safetensors'), replace(STREAM, tasks=(sixth,)), **QUIET)
    assert more.config['tasks'] == [*STREAM.names, sixth.name] and more.selectors['gaussian']['n_tasks'] == 6


# ---- identity, interruption

class Stop(Callback):
    "Fails in the second of the new tasks."
    def before_task(self, learner):
        if learner.index == 4: raise MemoryError

def test_an_interrupted_one_goes_on_and_belongs_to_what_it_extends(three, extended, tmp_path, capsys):
    d = tmp_path/'run'
    with patch.object(loop, 'Progress', lambda bar: Stop()):
        with pytest.raises(MemoryError): extend(three/'moe', NEW, d, **QUIET)
    with pytest.raises(NotThisRun, match='another extends.sha256'): extend(three/'moe_copy', NEW, d, **QUIET)
    result, whole = extend(three/'moe', NEW, d, **QUIET), load_result(extended, adapters=True)
    assert equal(result.adapters, whole.adapters) and rows(result) == rows(whole)
    begun = result.timings
    assert extend(three/'moe', NEW, d, **QUIET).timings == begun
    assert 'not run again' in capsys.readouterr().err
    file = load(three/'moe').save(tmp_path/'x.safetensors') # the same run, in another form
    assert extend(file, NEW, d, **QUIET).timings == begun
    with pytest.raises(NotThisRun, match='another extends.evaluated'):
        extend(three/'moe', NEW, d, old=first(STREAM, 1), **QUIET)

def test_old_images_must_be_those_that_were_learned(three):
    other = first(toy_stream(n_tasks=3, n_train=8, n_test=4, seed=1), 1)
    with pytest.raises(ValueError, match="images or words of 'squares' are not those"):
        extend(three/'moe', NEW, old=other, **QUIET)
    with pytest.raises(ValueError, match='none of those that are known'): extend(three/'moe', NEW, old=NEW, **QUIET)
    with pytest.raises(ValueError, match="'squares' is among the tasks that are known"):
        extend(three/'moe', first(STREAM, 1), **QUIET)


# ---- a full bank

@pytest.fixture(scope='module')
def full(tmp_path_factory):
    "A run that has frozen all of its experts."
    d = tmp_path_factory.mktemp('full')/'run'
    freeze = FreezeMostUsed(n=3)
    method = replace(METHODS['moe'], freeze=freeze, experts=dict(n_experts=3, rank=2))
    learned(first(STREAM, 2), method, directory=d)
    result = load_result(d, adapters=True, selectors=True)
    for k, w in result.adapters.items():
        if k.endswith('.frozen'): w.fill_(True)
    return save_result(result, d)

def test_a_full_bank_is_refused_before_training_with_what_can_be_done(full, tmp_path):
    with pytest.raises(ValueError, match='all experts are frozen in .* blocks.*add_experts=NUMBER.*add_experts=0'):
        extend(full, NEW, tmp_path/'new', **QUIET)
    assert not (tmp_path/'new').exists()
    for n in (-1, 1.5):
        with pytest.raises(ValueError, match='add_experts is'): extend(full, NEW, add_experts=n, **QUIET)

def test_added_experts_are_used_and_change_no_old_prediction(full, tmp_path):
    more = extend(full, NEW, tmp_path/'new', add_experts=4, **QUIET)
    old, new = load(full).model, load(tmp_path/'new').model
    assert new.settings.n_experts == 7 and [len(m.experts) for m in new.moes] == [7]*len(new.moes)
    images = torch.stack([t.test[i][0] for t in STREAM for i in range(4)])
    tokens = load(full).tokenizer([f'a photo of a {c}.' for t in STREAM for c in t.classes])
    for task in (0, 1):
        assert torch.equal(old.encode_image(images, task), new.encode_image(images, task))
        assert torch.equal(old.encode_text(tokens, task), new.encode_text(tokens, task))
        assert torch.equal(old.encode_prompts(tokens, task), new.encode_prompts(tokens, task))
    closed = [[r.closed.tolist() for r in m.routers] for m in new.moes]
    assert all(c == [[False]*3]*2 + [[False]*7]*2 for c in closed)
    used = more.usage[(more.usage.expert >= 3) & (more.usage['count'] > 0)]
    assert set(used.after) == set(NEW.names)
    assert more.config['experts']['n_experts'] == 7 and more.config['extends']['add_experts'] == 4

def test_frozen_experts_can_be_shared_if_that_is_meant(full):
    more, before = extend(full, NEW, add_experts=0, **QUIET), load_result(full, adapters=True).adapters
    assert all(torch.equal(w, more.adapters[k]) for k, w in before.items())
    gate = more.adapters['0.routers.2.gate']
    assert gate.abs().max() > 0 # only the routers were trained


# ---- what cannot be extended

@pytest.mark.parametrize('name, says', [('zero_shot', "'zero_shot' trains nothing"), ('finetune', "trains backbone")])
def test_a_method_without_experts_is_refused_by_name(name, says):
    method = replace(named(name), train=Train(iterations=1, batch=4))
    result = learned(first(STREAM, 1), method)
    with pytest.raises(ValueError, match=says): extend(result, NEW, **QUIET)

def test_a_run_that_kept_no_states_is_refused(three):
    with pytest.raises(ValueError, match='is not finished, was made by an earlier version'):
        extend(load_result(three/'moe', adapters=True), NEW, **QUIET)

def test_a_strangers_file_imports_nothing(three):
    shared = load(three/'moe')
    shared.provenance['predict'] = 'os.system'
    with pytest.raises(ValueError, match=r'not of this package \(os.system\)'): extend(shared, NEW, **QUIET)
    shared.provenance = dict(note='no run')
    with pytest.raises(ValueError, match='only a mixture of experts'): extend(shared, NEW, **QUIET)


# ---- a folder of one's own, by the command

def picture(path, mode='RGB', seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype='uint8')
    Image.fromarray(pixels).convert(mode).save(path, **how)

def odd(root, task):
    "A task with grey, CMYK and turned photographs, a broken file, and what systems leave behind."
    turned = Image.Exif()
    turned[0x0112] = 6
    for k, split in enumerate(('train', 'test')):
        for c, name in enumerate((unicodedata.normalize('NFD', 'caf\u00e9'), '2001')):
            d = root/task/split/name
            for i in range(3): picture(d/f'{i}.png', seed=100*k + 10*c + i)
            picture(d/'grey.png', 'L', 100*k + 10*c + 3)
            picture(d/'print.jpg', 'CMYK', 100*k + 10*c + 4)
            picture(d/'turned.jpg', seed=100*k + 10*c + 5, exif=turned)
            (d/'broken.jpg').write_bytes(b'\xff\xd8\xff no image')
            (d/'.DS_Store').write_bytes(b'x')
    return root

def test_an_odd_folder_is_learned_and_extended_by_the_command(tmp_path):
    known, new = odd(tmp_path/'known', '2019'), odd(tmp_path/'new', unicodedata.normalize('NFD', 'e\u0301t\u00e9'))
    common = ['stream=folder', f'stream.cache={tmp_path}/cache', 'image_size=32']
    said = ['method=moe', 'model=toy', 'train.iterations=2', 'train.batch=4', 'experts.n_experts=6', 'seed=4']
    with pytest.warns(UserWarning, match='broken'):
        a = job(composed(*common, f'root={known}', *said, 'selectors=[oracle,gaussian]'), str(tmp_path/'run'), False)
        asked = [*common, f'root={new}', f'extend={tmp_path}/run', f'old={known}', 'seed=4', 'experts.n_experts=6']
        b = extend_job(composed(*asked), str(tmp_path/'more'), asked, False)
    assert a.config['tasks'] == ['2019'] and b.config['tasks'] == ['2019', '\u00e9t\u00e9']
    assert accuracy_matrix(b, 'gaussian').shape == (1, 2)
    assert [t.name for t in load(tmp_path/'more').tasks] == b.config['tasks']
    assert load(tmp_path/'more').tasks[1].classes == ('2001', 'caf\u00e9')
    c = load_classifier(tmp_path/'more')
    with pytest.warns(UserWarning, match='broken'): table = c(new, task=b.config['tasks'][1])
    assert {Path(p).name for p in table.path} == {'0.png', '1.png', '2.png', 'grey.png', 'print.jpg', 'turned.jpg'}
    assert set(table['class']) <= {'2001', 'caf\u00e9'}
    for wrong, says in (('seed=5', 'seed is 5, .* with 4'), ('method=moe_merge', "'moe_merge', .* with 'moe'"),
                        ('train.iterations=3', 'train.iterations is 3, .* with 2'),
                        ('model=pico', "'pretrained': None}, .* 'pretrained': 'random'"),
                        ('rewrite=msmoe', 'one command does one of them')):
        given = [*(a for a in asked if not a.startswith(wrong.partition('=')[0])), wrong]
        with pytest.raises(UsageError, match=says): extend_job(composed(*given), None, given, False)
    nothing = [a if not a.startswith('old=') else f'old={new}' for a in asked]
    with pytest.raises(UsageError, match='where none of the tasks is that the run knows'):
        extend_job(composed(*nothing), None, nothing, False)


# ---- the command, killed

LEARN = [
    'stream=toy', 'stream.n_tasks=2', 'method=moe_merge', 'train.iterations=2', 'train.batch=4', 'experts.n_experts=8']
MORE = [
    'extend=run', 'old=true', 'save_every=2', 'stream=mini', 'order=[MNIST]', 'stream.n_train=20', 'stream.n_test=4']

def test_killed_while_it_extends_a_drawn_stream_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = ['selectors=[oracle]', 'model=toy', f'stream.cache={tmp_path}/cache']
    assert end(begin([*LEARN, *how[:2], 'hydra.run.dir=run'])) == 0, Path('err.txt').read_text()
    more = [*MORE, how[2]]
    assert end(begin([*more, 'hydra.run.dir=whole'])) == 0, Path('err.txt').read_text()
    assert killed(begin([*more, 'hydra.run.dir=killed']), 'killed/checkpoint.safetensors')
    assert end(begin([*more, 'hydra.run.dir=killed'])) == 0, Path('err.txt').read_text()
    for name in ('matrix.csv', 'events.jsonl', 'usage.csv', 'adapters.safetensors'):
        assert Path('whole', name).read_bytes() == Path('killed', name).read_bytes(), name
    matrix = load_result('whole').matrix
    assert list(matrix.task) == ['squares', 'circles', 'MNIST'] and set(matrix.after) == {'MNIST'}
