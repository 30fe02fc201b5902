"""A finished number comes back only for the inputs that made it: the same images, words, weights and functions."""
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile
from unittest.mock import patch
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from moe_merge_nb.clip.backbone import load_clip, pico, write_weights
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method, describe
from moe_merge_nb.learn.recover import NotThisRun
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.merge.combine import COMBINE
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.rewrites.reduce import load_banks
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import stream_of
from moe_merge_nb.run.rewrite import rewrite_run
from moe_merge_nb.safe import known
from moe_merge_nb.safe.doors import changed, gone, sources
from moe_merge_nb.safe.imports import own_modules
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.identity import digest_of, identity
from moe_merge_nb.streams.miniature import miniature
from moe_merge_nb.streams.tasks import Images, Stream, toy_stream

TOY = ['stream=toy', 'stream.n_tasks=2', 'stream.n_train=12', 'stream.n_test=6', 'model=toy']
MERGE = [
    'method=moe_merge', 'merge.every=1', 'merge.until=1', 'train.iterations=2', 'train.warmup=1', 'train.batch=4',
    'experts.n_experts=4', 'experts.rank=2', 'selectors=[oracle]']


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory, and a cache folder of its own."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    monkeypatch.syspath_prepend(tmp_path/'here')
    before = set(sys.modules)
    yield tmp_path/'here'
    for name in set(sys.modules) - before: del sys.modules[name]

def finished(*overrides, d='run'):
    "A run of the toy stream."
    return job(composed(*TOY, *overrides), d, False)

def forget(*names):
    "As in another process: what was imported is imported again."
    for name in names: sys.modules.pop(name, None)


# ---- functions

RULE = 'def f(states, counts, before): return {n: sum(s[n] for s in states)/len(states) for n in states[0]}\n'

def test_an_edited_rule_is_another_run_and_the_old_one_is_named(here, capsys):
    (here/'r.py').write_text(RULE)
    first = finished(*MERGE, 'merge.combine=r.f')
    assert finished(*MERGE, 'merge.combine=r.f').timings == first.timings
    assert f"finished on {first.config['finished']}, not run again: run" in capsys.readouterr().err
    (here/'r.py').write_text(RULE.replace('sum(', '-50*sum('))
    forget('r')
    with pytest.raises(UsageError, match=r"another sources.r.f \(its file was edited since"):
        finished(*MERGE, 'merge.combine=r.f')
    there = finished(*MERGE, 'merge.combine=r.f', d='edited')
    assert any(not torch.equal(w, there.adapters[k]) for k, w in first.adapters.items())

def test_a_helper_that_a_rule_imports_counts_and_an_unrelated_file_does_not(here):
    (here/'parts').mkdir()
    (here/'helper.py').write_text('from parts.scale import times\n')
    (here/'parts'/'scale.py').write_text('times = 1.\n')
    (here/'unrelated.py').write_text('x = 1\n')
    (here/'r.py').write_text('def f(states, counts, before):\n    import helper\n    return states[0]\n')
    parts = {'merge.combine': ('r.f', {})}
    before = sources(parts)
    assert set(before) == {'r.f', 'helper', 'parts.scale'}
    (here/'unrelated.py').write_text('x = 2\n')
    assert sources(parts) == before
    (here/'parts'/'scale.py').write_text('times = 2.\n')
    after = sources(parts)
    assert [k for k in before if after[k] != before[k]] == ['parts.scale']

def test_imports_by_text_are_followed(here):
    for name in 'abcd': (here/f'{name}.py').write_text('x = 1\n')
    (here/'pack').mkdir()
    (here/'pack'/'one.py').write_text('x = 1\n')
    (here/'pack'/'two.py').write_text('from importlib import import_module\none = import_module(".one", __package__)\n')
    (here/'r.py').write_text(
        'import importlib, pkgutil\nfrom importlib import import_module\nname = "d"\n'
        'def f(states, counts, before):\n'
        '    importlib.import_module("a"), __import__("b"), pkgutil.resolve_name("c:x"), import_module("pack.two")\n'
        '    return importlib.import_module(name)\n')
    assert own_modules('r') == {'r', 'a', 'b', 'c', 'd', 'pack.two', 'pack.one'}

WAYS = {
    'a keyword': 'import importlib\ndef f(): importlib.import_module(name="pack.one")\n',
    'another name': 'from importlib import import_module as load\ndef f(): load("pack.one")\n',
    'another package': 'from importlib import import_module\ndef f(): import_module(".one", "pack")\n',
    'after one that fails': 'import importlib\ndef f(): importlib.import_module("..x")\nfrom pack import one\n',
    'a table': 'import importlib\nPARTS = ["json", "pack.one"]\ndef f(i): importlib.import_module(PARTS[i])\n',
}

@pytest.mark.parametrize('way', WAYS)
def test_every_way_to_import_by_text_is_followed(here, way):
    (here/'pack').mkdir()
    (here/'pack'/'one.py').write_text('x = 1\n')
    (here/'r.py').write_text(WAYS[way])
    assert own_modules('r') == {'r', 'pack.one'}

def test_what_a_package_offers_by_all_counts(here):
    (here/'pack').mkdir()
    (here/'pack'/'__init__.py').write_text('__all__ = ["one"]\n')
    for name in ('one', 'two'): (here/'pack'/f'{name}.py').write_text('x = 1\n')
    (here/'r.py').write_text('from pack import *\n')
    assert own_modules('r') == {'r', 'pack', 'pack.one'}

def test_folders_without_init_are_followed_at_any_depth(here):
    (here/'ns'/'sub').mkdir(parents=True)
    (here/'ns'/'sub'/'h.py').write_text('x = 1\n')
    (here/'r.py').write_text('from ns.sub import h\n')
    assert own_modules('r') == {'r', 'ns.sub.h'}

def test_a_text_is_no_import_where_nothing_is_imported_by_text(here):
    (here/'mean.py').write_text('x = 1\n')
    (here/'r.py').write_text('def f(states, counts, before): return "mean"\n')
    assert own_modules('r') == {'r'}

def test_what_is_packed_into_an_archive_counts(here, monkeypatch):
    def packed(text):
        with ZipFile(here/'parts.zip', 'w') as z: z.writestr('packed.py', text)
    packed('import helper\nx = 1.\n')
    (here/'helper.py').write_text('y = 1\n')
    (here/'r.py').write_text('import packed\n' + RULE)
    monkeypatch.syspath_prepend(str(here/'parts.zip'))
    parts = {'merge.combine': ('r.f', {})}
    before = sources(parts)
    assert set(before) == {'r.f', 'packed', 'helper'}
    packed('import helper\nx = 2.\n')
    with pytest.raises(ValueError, match='parts.zip has changed since it was imported'): sources(parts)

def test_a_helper_that_comes_later_or_goes_is_noticed(here):
    (here/'r.py').write_text('try: import extra\nexcept ImportError: extra = None\n' + RULE)
    parts = {'merge.combine': ('r.f', {})}
    without = sources(parts)
    (here/'extra.py').write_text('x = 1\n')
    with_it = sources(parts)
    assert changed(without, with_it) == ['extra'] and not gone(with_it)
    (here/'extra.py').unlink()
    assert changed(with_it, sources(parts)) == [] and gone(with_it) == ['extra']

def test_packages_and_relative_imports_are_followed(here):
    (here/'pack').mkdir()
    (here/'pack'/'__init__.py').write_text('')
    (here/'pack'/'rule.py').write_text('import numpy as np\nfrom . import one\nfrom .two import x\n')
    (here/'pack'/'one.py').write_text('import json\n')
    (here/'pack'/'two.py').write_text('x = 1\n')
    assert own_modules('pack.rule') == {'pack', 'pack.rule', 'pack.one', 'pack.two'}

def test_a_file_that_was_edited_after_its_import_is_refused(here):
    (here/'r.py').write_text(RULE)
    sources({'merge.combine': ('r.f', {})})
    (here/'r.py').write_text(RULE + '# edited')
    with pytest.raises(ValueError, match='r.py has changed since it was imported here.*reload'):
        sources({'merge.combine': ('r.f', {})})

PARTS = {
    'experts.gate': 'def f(h, k=2): return h.softmax(-1)',
    'experts.router': 'f = list',
    'experts.expert': 'f = dict',
    'experts.mix': 'f = tuple',
    'merge.combine': RULE,
    'merge.start': 'def f(*args): pass',
    'predict': 'def f(view): return view.logits(-1)',
    'selectors[0]': 'class f: pass'}

@pytest.mark.parametrize('kind', PARTS)
def test_every_kind_of_part_counts_by_the_module_it_is_named_in(kind, here):
    (here/'r.py').write_text(PARTS[kind] + '\n')
    before = sources({kind: ('r.f', {})})
    (here/'r.py').write_text(PARTS[kind] + '\n# edited\n')
    forget('r')
    after = sources({kind: ('r.f', {})})
    assert set(before) == set(after) and before != after

def test_a_class_of_ones_own_in_a_method_counts(here):
    (here/'own.py').write_text('from moe_merge_nb.learn.callbacks import FreezeMostUsed\n'
                               'class Mine(FreezeMostUsed): pass\n')
    from own import Mine
    said = describe(toy_stream(1), Method('m', freeze=Mine()), 0, saved=True)
    assert list(said['sources']) == ['own.Mine'] and len(said['sources']['own.Mine']) == 64
    Mine.__module__ = '__main__'
    if getattr(sys.modules['__main__'], '__file__', None): return
    with pytest.raises(ValueError, match='is in no file'): describe(toy_stream(1), Method('m', freeze=Mine()), 0, True)


# ---- the model

def test_overwritten_weights_are_another_run(here):
    write_weights(pico(0), 'w.safetensors')
    first = finished('method=zero_shot', 'model=pico', 'model.pretrained=w.safetensors')
    write_weights(pico(1), 'w.safetensors')
    with pytest.raises(UsageError, match='another backbone_sha256'):
        finished('method=zero_shot', 'model=pico', 'model.pretrained=w.safetensors')
    write_weights(pico(0), 'w.safetensors')
    again = finished('method=zero_shot', 'model=pico', 'model.pretrained=w.safetensors')
    assert again.timings == first.timings

def test_another_tokenizer_or_another_activation_is_another_run(here):
    (clip, tokenizer), method = load_clip('toy', 'random'), Method('z', tune='nothing', experts=None)
    def learned(*backbone): return run(toy_stream(2, 3, 6, 6), method, 0, backbone, 'run', progress=False)
    learned(clip, tokenizer)
    with pytest.raises(NotThisRun, match='another tokens_sha256'): learned(clip, lambda texts: tokenizer(texts).flip(1))
    for b in clip.visual.transformer.resblocks: b.mlp.gelu = torch.nn.ReLU()
    with pytest.raises(NotThisRun, match='another architecture_sha256'): learned(clip, tokenizer)


# ---- data

def test_another_root_is_another_run_and_the_same_files_elsewhere_are_the_same(here):
    miniature('A')
    miniature('C', seed=7)
    shutil.copytree('A', 'B')
    mtil = [
        'stream=mtil', 'stream.check=false', 'stream.tasks=[DTD,MNIST]', 'image_size=32', 'model=toy',
        'method=zero_shot', 'protocol=mini']
    def there(root): return job(composed(*mtil, f'root={root}'), 'run', False)
    first = there('A')
    assert there('B').timings == first.timings
    with pytest.raises(UsageError, match='another data_sha256.DTD .*another data_sha256.MNIST'): there('C')

def swap(a, b):
    for old, new in ((a, 'aside'), (b, a), ('aside', b)): os.rename(old, new)

def test_images_that_were_swapped_with_names_sizes_and_times_kept_are_another_stream(here):
    for c, colour in (('a', 'red'), ('b', 'blue')):
        for split in ('train', 'test'):
            Path(f'root/task/{split}/{c}').mkdir(parents=True)
            for i in range(2): Image.new('RGB', (8, 8), colour).save(f'root/task/{split}/{c}/{i}.bmp')
    for f in Path('root').rglob('*.bmp'): os.utime(f, ns=(10**18, 10**18))
    first = identity(folder('root', size=8))
    assert identity(folder('root', size=8)) == first
    swap('root/task/test/a', 'root/task/test/b')
    for f in Path('root').rglob('*.bmp'): os.utime(f, ns=(10**18, 10**18))
    assert identity(folder('root', size=8)) != first
    swap('root/task/test/a', 'root/task/test/b')
    assert identity(folder('root', size=8)) == first
    assert identity(folder('root', size=16)) != first

def test_content_overwritten_in_place_with_its_time_set_back_is_noticed(here):
    files = [f'{i}.bin' for i in range(3)]
    for f in files: Path(f).write_bytes(b'one')
    first, info = known.file_digests(files), os.stat('1.bin')
    with open('1.bin', 'r+b') as f: f.write(b'two')
    os.utime('1.bin', ns=(info.st_atime_ns, info.st_mtime_ns))
    assert os.stat('1.bin').st_size == 3 and os.stat('1.bin').st_mtime_ns == info.st_mtime_ns
    assert known.file_digests(files) == [first[0], hashlib.sha256(b'two').hexdigest(), first[2]]

def words(stream, **change):
    "The stream with other words in its first task."
    return replace(stream, tasks=(replace(stream[0], **change), *stream.tasks[1:]))

def test_every_pixel_label_class_name_and_template_counts():
    stream = toy_stream(2, 3, 6, 6)
    first, t = identity(stream), stream[0]
    images, labels = t.test.images.clone(), t.test.labels.clone()
    images[-1, -1, -1, -1] ^= 1
    labels[0] = (labels[0] + 1) % 3
    others = [
        words(stream, classes=('x', *t.classes[1:])),
        words(stream, templates=(*t.templates, 'a {}.')),
        words(stream, test=Images(images, t.test.labels)),
        words(stream, test=Images(t.test.images, labels)),
        words(stream, calibration=Images(t.train.images.flip(0), t.train.labels))]
    found = [identity(s) for s in others]
    assert len({f['squares'] for f in (*found, first)}) == 6
    assert {f['circles'] for f in found} == {first['circles']}

class Own(Dataset):
    "Images of somebody's own, with a random flip, or with something that cannot be seeded."
    def __init__(self, images, draws=None): self.images, self.draws = images, draws
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        x, y = self.images[i]
        if self.draws == 'global' and (torch.rand(()) < .5) == (random.random() < np.random.rand()): x = x.flip(2)
        if self.draws == 'system': x = x + int.from_bytes(os.urandom(4), 'big') / 2**32
        return x, y

class Told(Own):
    def digest(self): return 'version 1'

class Changed(Images):
    "Loads something else than the class it inherits `digest` from."
    def __getitem__(self, i): return super().__getitem__(i)[0].flip(1), 0

def test_a_dataset_of_ones_own_is_hashed_item_by_item_or_asked():
    data = toy_stream(1, 3, 24, 6)[0].train
    plain, flipped = Own(data), Own(data, 'global')
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    a = digest_of(flipped)
    assert torch.equal(torch.rand(2), want), 'it draws from the generators of the run'
    assert digest_of(flipped) == a != digest_of(plain) == digest_of(Own(data))
    assert digest_of(Told(data, 'system')) == digest_of(Told(data))
    with pytest.raises(ValueError, match='Own gives other images each time.*Give it a method digest'):
        digest_of(Own(data, 'system'))
    assert digest_of(Changed(data.images, data.labels)) != digest_of(Changed(data.images.flip(0), data.labels))

def test_a_stream_that_cannot_be_recognised_is_refused_where_it_would_be_saved(tmp_path):
    t = toy_stream(1, 3, 24, 6)[0]
    stream = Stream('own', (replace(t, train=Own(t.train, 'system'), calibration=t.train),))
    with pytest.raises(ValueError, match="task 'squares': a .*Own gives other images each time"):
        run(stream, Method('z', tune='nothing', experts=None), 0, load_clip('toy', 'random'), tmp_path, progress=False)
    with pytest.warns(UserWarning, match='Give it a method digest'):
        assert describe(stream, Method('z'), 0)['data_sha256'] == {'squares': None}


# ---- what is known of files

def test_what_is_known_of_files_is_shared_killed_and_damaged_without_harm(here):
    store, files = known.store_in(), [f'{i}.bin' for i in range(5)]
    for f in files: Path(f).write_text(f)
    want, asked = known.file_digests(files), []
    def digest(path):
        asked.append(path)
        return known.file_digest(path)
    def again(): return [k.value for k in known.known(files, digest, 'sha256', store).values()]
    assert again() == want and asked == []
    with sqlite3.connect(store) as other: # a flipped value is found by its checksum, and read again
        other.execute('UPDATE known SET value=? WHERE path=?', ('"0"', os.fsencode(os.path.abspath('2.bin'))))
    other.close()
    assert again() == want and asked == ['2.bin']
    data = store.read_bytes()
    for damaged in (b'', b'x' * 500, data[:5000], data[:100] + os.urandom(len(data) - 100)):
        store.write_bytes(damaged)
        assert again() == want
    store.unlink()
    store.mkdir()
    with pytest.warns(UserWarning, match='could not be kept'): assert again() == want

def reader(files, slow=False):
    "A process that reads all files: its number."
    pid = os.fork()
    if pid: return pid
    known._AT_ONCE = 5
    def digest(path):
        if slow: time.sleep(.01)
        return known.file_digest(path)
    try: known.known(files, digest, 'sha256', known.store_in())
    finally: os._exit(0)

def test_several_processes_and_a_killed_one_leave_what_is_known_whole(here):
    files = [f'{i}.bin' for i in range(200)]
    for f in files: Path(f).write_text(f)
    killed, others = reader(files, slow=True), [reader(files) for _ in range(3)]
    time.sleep(.1)
    os.kill(killed, signal.SIGKILL)
    for pid in (killed, *others): os.waitpid(pid, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = known.known(files, lambda path: pytest.fail('it is known'), 'sha256', known.store_in())
    assert [k.value for k in found.values()] == [hashlib.sha256(f.encode()).hexdigest() for f in files]

def test_odd_file_names_are_known_and_missing_files_are_named(here):
    odd = [os.fsdecode(b'\xff.bin'), 'a\nb', '雪.bin']
    for f in odd: Path(f).write_text('x')
    assert known.file_digests(odd) == [hashlib.sha256(b'x').hexdigest()]*3 == known.file_digests(odd)
    with pytest.raises(ValueError, match='gone.bin cannot be read'): known.file_digests([*odd, 'gone.bin'])


# ---- what is made of a run

def test_a_run_is_not_rewritten_or_reproduced_on_other_data(here):
    finished(*MERGE)
    config = load_result('run').config
    assert identity(stream_of(config)) == config['data_sha256']
    with pytest.raises(ValueError, match="images or words of 'squares' are not those that the run saw"):
        stream_of(config, seed=1)
    with pytest.raises(ValueError, match='not those that the run saw'): rewrite_run('run', 'average', 2, seed=1)
    rule = 'from moe_merge_nb.rewrites.group import average\ndef f(*a, **k): return average(*a, **k)\n'
    (here/'mine.py').write_text(rule)
    _, where = rewrite_run('run', 'mine.f', 2)
    about = load_banks(where/'banks.safetensors')[1]
    assert about['sources'] == {'mine.f': hashlib.sha256((here/'mine.py').read_bytes()).hexdigest()}

def test_what_was_put_into_a_dictionary_counts_too(here):
    (here/'r.py').write_text(RULE)
    from r import f
    with patch.dict(COMBINE, mine=f):
        said = describe(toy_stream(1), Method('m', merge=Merge(combine='mine')), 0, True)['sources']
        assert said == {'mine': hashlib.sha256(RULE.encode()).hexdigest()}
        f.__module__ = '__main__'
        with pytest.raises(ValueError, match='no other process can import'):
            describe(toy_stream(1), Method('m', merge=Merge(combine='mine')), 0, True)

def test_a_model_function_of_ones_own_counts_by_its_file(here):
    text = 'from moe_merge_nb.clip.backbone import load_clip\ndef f(): return load_clip("toy", "random")\n'
    own = 'method=zero_shot', 'model=m.f', 'image_size=32'
    (here/'m.py').write_text(text)
    first = finished(*own)
    assert finished(*own).timings == first.timings
    (here/'m.py').write_text(text.replace('"random"', '"random", 0'))
    forget('m')
    with pytest.raises(UsageError, match='another model_sources.m.f'): finished(*own)
