"""Everything that reads files from outside is given files that are broken, foreign or hostile. It must read them rightly or refuse them: a ValueError or FileNotFoundError
that names the file. Never another exception, never a pickle, never an answer made of what is not there.

`pytest --hypothesis-profile=hunt tests/test_fuzz.py` looks for new cases, 50 times as many (tests/conftest.py)."""
import copy
import gzip
import json
import math
import pickle
import struct
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np
import pandas as pd
import pytest, torch
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings, strategies as st
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from moe_merge_nb.run import job, released, share, theirs
from moe_merge_nb.run.options import composed
from moe_merge_nb.layer.adapt import AdaptedCLIP, check_sizes
from moe_merge_nb.clip.backbone import read_weights, write_weights
from moe_merge_nb.safe.checkpoint import FORMAT, checksum, read_tree, write_tree
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.images import open_image, saved_few_shot
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.learn.saved import SUMS, load_result, save_result
from moe_merge_nb.learn.results import TABLES, example_result, summary
from moe_merge_nb.learn.pack import load_results, pack, unpack
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.baselines.zscl import from_folder

DEEP = '[' * 100_000


# ---- what is done to files

odd = st.one_of(st.none(), st.booleans(), st.sampled_from([0, -1, 1, 10**9, 2**63, 10**400, -0.5, 1e308, math.nan, math.inf, '', 'x', '../..', 'os.system', [], {}, [[]], {'a': 1}, [None], 'a' * 5000]), st.integers(), st.floats(), st.text(max_size=4))

@st.composite
def damage(draw):
    "A way to damage bytes: cut, flip, delete, repeat, insert, replace."
    kind, at, n, junk = draw(st.sampled_from(['cut', 'flip', 'delete', 'repeat', 'insert', 'zero', 'all'])), draw(st.floats(0, 1)), draw(st.integers(1, 40)), draw(st.binary(max_size=60))
    bits = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6))
    def change(data:bytes)->bytes:
        i = int(at * len(data))
        if kind == 'cut': return data[:i]
        if kind == 'delete': return data[:i] + data[i + n:]
        if kind == 'repeat': return data[:i] + data[i:i + n] + data[i:]
        if kind == 'insert': return data[:i] + junk + data[i:]
        if kind == 'zero': return data[:i] + bytes(min(n, len(data) - i)) + data[i + n:]
        if kind == 'all': return junk
        out = bytearray(data)
        for where, bit in bits: out[min(int(where * len(out)), len(out) - 1)] ^= 1 << bit
        return bytes(out)
    return change

def places(tree, at=()):
    "Where something can be replaced in a tree of JSON."
    yield at
    if isinstance(tree, dict):
        for k, v in tree.items(): yield from places(v, (*at, k))
    if isinstance(tree, list):
        for i, v in enumerate(tree[:3]): yield from places(v, (*at, i))

def replaced(tree, at, value):
    "`tree` with another value at one place; ... takes the place away."
    if not at: return value
    tree = copy.copy(tree)
    if value is ... and len(at) == 1: del tree[at[0]]
    else: tree[at[0]] = replaced(tree[at[0]], at[1:], value)
    return tree

@st.composite
def changed(draw, tree):
    "`tree` with one thing replaced by something odd, or gone."
    at = draw(st.sampled_from([p for p in places(tree) if p]))
    return replaced(tree, at, draw(st.one_of(st.just(...), odd)))

def safetensors(header, body:bytes=b'')->bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + body

class Canary:
    "Unpickling it leaves a file."
    path = None
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open, (self.path, 'w')


# ---- what is expected

def read_or_refused(read, *names):
    "What `read()` returns; None if it refuses, by name."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return read()
        except (ValueError, FileNotFoundError) as e:
            assert any(str(n) in str(e) for n in names), f'the message names none of {names}: {e}'
            assert type(e) in (ValueError, FileNotFoundError), f'{type(e).__name__} is not ours: {e}'

def refused(read, *names):
    assert read_or_refused(read, *names) is None


# ---- trees

TREE = dict(done=3, weights={'a': torch.arange(6.).view(2, 3), 'b': torch.zeros(0, 2)}, events=[dict(kind='merge', loss=.25)], n=None)

def tree_bytes(d): return write_tree(TREE, d/'tree.safetensors').read_bytes()

@given(damage())
def test_a_damaged_tree_is_read_or_refused_by_name(tmp_path_factory, change):
    d = tmp_path_factory.getbasetemp()
    data = tree_bytes(d)
    (d/'bad.safetensors').write_bytes(bad := change(data))
    found = read_or_refused(lambda: read_tree(d/'bad.safetensors'), 'bad.safetensors')
    if len(bad) < len(data): assert found is None, 'a file that is too short was read'

@given(st.floats(0, 1, exclude_max=True))
def test_a_tree_that_is_cut_anywhere_is_refused(tmp_path_factory, at):
    d = tmp_path_factory.getbasetemp()
    data = tree_bytes(d)
    (d/'cut.safetensors').write_bytes(data[:int(at * len(data))])
    refused(lambda: read_tree(d/'cut.safetensors'), 'cut.safetensors')

nodes = st.recursive(odd, lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(st.sampled_from(['tensor', 'dict', 'x']), inside, max_size=2)), max_leaves=6)

@given(nodes, st.integers(0, 2))
@example({'tensor': ['t0']}, 1)
@example({'dict': [1]}, 0)
def test_a_tree_of_any_json_is_read_or_refused_by_name(tmp_path_factory, tree, n):
    path = tmp_path_factory.getbasetemp()/'odd.safetensors'
    try: text = json.dumps(tree)
    except ValueError: assume(False)                                        # a number that json cannot write
    save_file(tensors := {f't{i}': torch.ones(2) for i in range(n)}, path, dict(format=FORMAT, tree=text, sha256=checksum(text, tensors)))
    read_or_refused(lambda: read_tree(path), 'odd.safetensors')

@given(st.one_of(st.binary(max_size=200), st.dictionaries(st.sampled_from(['__metadata__', 't0', 'a']), st.one_of(odd, st.fixed_dictionaries(dict(dtype=st.one_of(st.sampled_from(['F32', 'BOOL', 'F8_E4M3', 'U64', 'nope']), odd), shape=st.one_of(st.lists(st.one_of(st.integers(-1, 4), st.integers()), max_size=3), odd), data_offsets=st.one_of(st.lists(st.integers(-1, 40), min_size=2, max_size=2), odd))))).map(json.dumps).map(str.encode)),
       st.one_of(st.none(), st.integers(0, 2**64 - 1)), st.binary(max_size=40))
@example(DEEP.encode(), None, b'')
@example(b'{"a":' * 10_000, None, b'')
@example(b'{}', 2**63, b'')
def test_a_safetensors_file_of_any_header_is_read_or_refused_by_name(tmp_path_factory, text, length, body):
    path = tmp_path_factory.getbasetemp()/'header.safetensors'
    path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + body)
    for read in (read_tree, share.load, share.read_header, theirs.read_checkpoint): read_or_refused(lambda: read(path), 'header.safetensors', path.parent)

def test_json_of_any_depth_is_refused(tmp_path):
    run_directory(tmp_path)
    for name in ('config.json', 'timings.json', 'events.jsonl'):
        good = (tmp_path/'run'/name).read_bytes()
        (tmp_path/'run'/name).write_text(DEEP)
        refused(lambda: load_result(tmp_path/'run'), name)
        (tmp_path/'run'/name).write_bytes(good)
    for key, read in (('tree', read_tree), (share.KEY, share.load)):
        save_file({}, tmp_path/'deep.safetensors', {'format': FORMAT, 'sha256': checksum(DEEP, {}), key: DEEP})
        refused(lambda: read(tmp_path/'deep.safetensors'), 'deep.safetensors')


# ---- nothing is unpickled

def test_no_reader_unpickles(tmp_path):
    hatched = tmp_path/'hatched'
    bomb = pickle.dumps(Canary(hatched))
    torch.save({'state_dict': Canary(hatched)}, tmp_path/'bomb.pt')
    contents = dict(pickle=bomb, torch=(tmp_path/'bomb.pt').read_bytes(), gz=gzip.compress(bomb), numpy=b'')
    np.save(tmp_path/'bomb.npy', np.array([Canary(hatched)], dtype=object), allow_pickle=True)
    contents['numpy'] = (tmp_path/'bomb.npy').read_bytes()
    for kind, data in contents.items():
        for name, read in (('x.safetensors', read_tree), ('x.safetensors', share.load), ('x.safetensors', theirs.read_checkpoint), ('x.pt', theirs.read_checkpoint), ('x.pth', theirs.read_checkpoint),
                           ('x.csv.gz', unpack), ('x.csv', unpack), ('x.png', open_image), ('x.json', lambda p: saved_few_shot(p, [0, 1], 1))):
            (tmp_path/name).write_bytes(data)
            refused(lambda: read(tmp_path/name), name)
        for name in [*(f'{t}.csv' for t in TABLES), 'config.json', 'events.jsonl', 'timings.json', 'adapters.safetensors']:
            run_directory(tmp_path)
            (tmp_path/'run'/name).write_bytes(data)
            refused(lambda: load_result(tmp_path/'run', adapters=True), name)
            (tmp_path/'run'/name).unlink()
    assert not hatched.exists()
    pickle.loads(bomb)                                                      # the trap itself works
    assert hatched.exists()


# ---- shared adapters

def tiny_clip():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIP(8, CLIPVisionCfg(image_size=8, patch_size=4, width=8, layers=1, head_width=4), CLIPTextCfg(context_length=6, vocab_size=20, width=8, heads=2, layers=1)).eval()

class Kept(dict):
    "Not worth being shown when a test fails."
    def __repr__(self): return 'Kept()'

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "Adapters of two tasks in a file, its header and its tensors; the backbone is given, or in the file."
    d, clip, torch_state = tmp_path_factory.mktemp('shared'), tiny_clip(), torch.get_rng_state()
    model = AdaptedCLIP(clip, n_experts=3, rank=2, top_k=2)
    for _ in range(2): model.add_task()
    tasks = [share.Words('one', ('cat', 'dog'), ('a {}.',)), share.Words('two', ('ship',), ('a {}.',))]
    given_, inside = share.save(model, d/'given.safetensors', name='tiny', tasks=tasks), share.save(model, d/'inside.safetensors', tasks=tasks, with_backbone=True)
    torch.set_rng_state(torch_state)
    checked = d/'checked.safetensors'
    checked.write_bytes(given_.read_bytes())
    for path in (given_, inside): save_file(load_file(path), path, {share.KEY: json.dumps({**share.read_header(path), 'version': 1})})   # without a checksum, which would find everything first
    return Kept(clip=clip, path=given_, checked=checked, header=share.read_header(given_), tensors=load_file(given_), inside=inside, header_inside=share.read_header(inside), tensors_inside=load_file(inside))

def usable(found, tensors):
    "Whoever gets adapters can encode with every task there is, and gets numbers."
    if found is None: return
    assert found.model.n_tasks == len({k.rsplit('.', 1)[0] for k in tensors if '.routers.' in k and k.startswith('0.')})
    for task in range(found.model.n_tasks): assert found.model.encode_image(torch.ones(1, 3, 8, 8), task).isfinite().all()
    assert all(isinstance(t.name, str) and (t.classes is None or all(isinstance(c, str) for c in t.classes)) for t in found.tasks)

@given(data=st.data())
def test_a_shared_file_with_an_odd_header_is_usable_or_refused_by_name(tmp_path_factory, shared, data):
    path, header = tmp_path_factory.getbasetemp()/'odd.safetensors', data.draw(changed(shared['header']))
    try: text = json.dumps(header)
    except ValueError: assume(False)
    save_file(shared['tensors'], path, {share.KEY: text})
    usable(read_or_refused(lambda: share.load(path, (shared['clip'], None)), 'odd.safetensors'), shared['tensors'])

@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(data=st.data())
def test_a_shared_file_with_an_odd_description_of_its_backbone_is_usable_or_refused_by_name(tmp_path_factory, shared, data):
    path, header = tmp_path_factory.getbasetemp()/'odd.safetensors', shared['header_inside']
    config = data.draw(changed(header['backbone']['config']))
    try: text = json.dumps({**header, 'backbone': {**header['backbone'], 'config': config}})
    except ValueError: assume(False)
    save_file(shared['tensors_inside'], path, {share.KEY: text})
    usable(read_or_refused(lambda: share.load(path), 'odd.safetensors'), shared['tensors'])

@given(st.sampled_from(['gone', 'more', 'shape', 'kind', 'nan', 'renamed']), st.data())
def test_a_shared_file_with_other_tensors_is_refused_and_names_one(tmp_path_factory, shared, how, data):
    path, tensors = tmp_path_factory.getbasetemp()/'odd.safetensors', dict(shared['tensors'])
    name = data.draw(st.sampled_from(sorted(k for k, t in tensors.items() if t.is_floating_point())))
    if how in ('gone', 'renamed'): t = tensors.pop(name)
    if how == 'renamed': tensors[name + 'x'] = t
    if how == 'more': tensors[name := 'else'] = torch.ones(1)
    if how == 'shape': tensors[name] = tensors[name][..., None]
    if how == 'kind': tensors[name] = tensors[name].int()
    if how == 'nan': tensors[name] = torch.full_like(tensors[name], data.draw(st.sampled_from([math.nan, math.inf])))
    save_file(tensors, path, {share.KEY: json.dumps(shared['header'])})
    with pytest.raises(ValueError, match='odd.safetensors: .*does not fit.*' + name): share.load(path, (shared['clip'], None))

@given(damage())
def test_a_damaged_shared_file_is_usable_or_refused_by_name(tmp_path_factory, shared, change):
    path = tmp_path_factory.getbasetemp()/'bad.safetensors'
    path.write_bytes(bad := change(good := shared['path'].read_bytes()))
    found = read_or_refused(lambda: share.load(path, (shared['clip'], None)), 'bad.safetensors', path.parent)
    if len(bad) < len(good): assert found is None
    usable(found, shared['tensors'])

@given(st.one_of(odd, st.dictionaries(st.sampled_from(['experts', 'tasks', 'model', 'pretrained', 'version']), odd)))
def test_adapters_of_a_run_with_an_odd_configuration_are_usable_or_refused_by_name(tmp_path_factory, shared, config):
    d = tmp_path_factory.getbasetemp()/'run'
    d.mkdir(exist_ok=True)
    save_file(shared['tensors'], d/'adapters.safetensors')
    base = dict(experts=shared['header']['experts'], tasks=['one', 'two'])
    try: (d/'config.json').write_text(json.dumps({**base, **config} if isinstance(config, dict) else config))
    except ValueError: assume(False)
    usable(read_or_refused(lambda: share.load(d, (shared['clip'], None)), d), shared['tensors'])


# ---- run directories

def run_directory(d, sums=False):
    "Without checksums, as earlier versions wrote it: they would find all that is done to its files before anybody reads them."
    r = example_result(n_tasks=2, n_experts=3)
    r.adapters = {'a': torch.ones(3)}
    save_result(r, d := d/('summed' if sums else 'run'))
    if not sums: (d/SUMS).unlink()
    return d

def sound(r):
    "A result that was read is one that can be shown: its metrics are numbers from 0 to 100, or their absence is an error."
    if r is None: return
    assert isinstance(r.config, dict) and isinstance(r.timings, dict) and all(isinstance(e, dict) for e in r.events)
    assert {name: list(getattr(r, name).columns) for name in TABLES} == TABLES
    try: numbers = summary(r)[['Transfer', 'Average', 'Last']].to_numpy(float)
    except ValueError as e: assert 'selector' in str(e) or 'square' in str(e), e
    else: assert ((numbers >= 0) & (numbers <= 100) | np.isnan(numbers)).all()

FILES = [*(f'{t}.csv' for t in TABLES), 'config.json', 'events.jsonl', 'timings.json', 'adapters.safetensors']

@given(st.sampled_from(FILES), damage())
def test_a_damaged_run_directory_is_sound_or_refused_by_name(tmp_path_factory, name, change):
    d = run_directory(tmp_path_factory.getbasetemp())
    (d/name).write_bytes(change((d/name).read_bytes()))
    sound(read_or_refused(lambda: load_result(d, adapters=True), name))

@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_a_file_of_a_run_that_is_cut_is_refused_unless_between_two_lines(tmp_path_factory, name, at):
    d = run_directory(tmp_path_factory.getbasetemp())
    data = (d/name).read_bytes()
    (d/name).write_bytes(cut := data[:int(at * len(data))])
    found = read_or_refused(lambda: load_result(d, adapters=True), name)
    assert found is None or name.endswith(('.csv', '.jsonl')) and (not cut or cut.endswith(b'\n'))

cells = st.one_of(st.sampled_from(['', 'nan', 'inf', '-inf', '-1', '1e400', '101', '0.5', 'x', 'Aircraft', '"', "\x00", ',', '1_0', '0x10', 'True', ' 3', '１', '999999999999999999999']), st.text(max_size=4))

@given(st.sampled_from(sorted(TABLES)), st.data())
def test_a_table_with_an_odd_cell_is_sound_or_refused_by_name(tmp_path_factory, table, data):
    d = run_directory(tmp_path_factory.getbasetemp())
    rows = (d/f'{table}.csv').read_text().splitlines()
    i, j = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(TABLES[table]) - 1))
    row = rows[i].split(',')
    rows[i] = ','.join([*row[:j], data.draw(cells), *row[j + 1:]])
    (d/f'{table}.csv').write_text('\n'.join(rows) + '\n', encoding='utf-8', errors='replace')
    found = read_or_refused(lambda: load_result(d), f'{table}.csv')
    sound(found)
    if found: assert all(getattr(found, table)[c].dtype.kind == 'i' and (getattr(found, table)[c] >= 0).all() for c in ('count', 'block', 'expert') if c in TABLES[table])

@given(st.sampled_from(['config.json', 'timings.json', 'events.jsonl']), odd)
def test_json_of_another_kind_in_a_run_directory_is_refused_by_name(tmp_path_factory, name, value):
    d = run_directory(tmp_path_factory.getbasetemp())
    (d/name).write_text(json.dumps(value) + '\n' if not isinstance(value, int) or abs(value) < 2**70 else '{}x\n')
    if not isinstance(value, dict) or name == 'config.json': refused(lambda: load_result(d), name)

@given(st.one_of(odd, st.lists(st.one_of(odd, st.sampled_from(['Aircraft', 'Caltech'])), max_size=3)))
def test_tasks_of_another_kind_in_a_configuration_are_sound_or_refused(tmp_path_factory, tasks):
    d = run_directory(tmp_path_factory.getbasetemp())
    try: (d/'config.json').write_text(json.dumps({**json.loads((d/'config.json').read_text()), 'tasks': tasks}))
    except ValueError: assume(False)
    sound(read_or_refused(lambda: load_result(d), 'config.json'))

@given(st.sampled_from(FILES))
def test_a_missing_file_of_a_run_is_named(tmp_path_factory, name):
    d = run_directory(tmp_path_factory.getbasetemp())
    (d/name).unlink()
    if name == 'adapters.safetensors': assert load_result(d, adapters=True).adapters is None
    else:
        with pytest.raises(FileNotFoundError, match=name): load_result(d)
        (d/name).mkdir()
        with pytest.raises(FileNotFoundError, match=name): load_result(d)
        (d/name).rmdir()

names = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=6)     # `Task` refuses the others

@given(st.lists(names, min_size=1, max_size=3, unique=True))
@example(['a,b', '"', 'nan'])
@example(["'", 'NA', ' x'])
@example(['\u2028', '1', '-'])
def test_a_run_whose_tasks_have_any_names_comes_back(tmp_path_factory, tasks):
    d, r = tmp_path_factory.getbasetemp()/'named', example_result(n_tasks=len(tasks), n_experts=3)
    new = dict(zip(r.config['tasks'], tasks))
    r.config['tasks'] = tasks
    for t in TABLES: setattr(r, t, getattr(r, t).replace(new))
    back = load_result(save_result(r, d))
    assert back.config['tasks'] == tasks
    for t in TABLES: pd.testing.assert_frame_equal(getattr(back, t), getattr(r, t), check_dtype=False)
    pd.testing.assert_frame_equal(summary(back), summary(r))

@given(st.booleans(), damage())
def test_a_damaged_packed_file_is_sound_or_refused_by_name(tmp_path_factory, packed, change):
    path = tmp_path_factory.getbasetemp()/('runs.csv.gz' if packed else 'runs.csv')
    pack([example_result('moe', 0, n_tasks=2, n_experts=3), example_result('moe_merge', 1, n_tasks=2, n_experts=3)], path)
    path.write_bytes(change(path.read_bytes()))
    for r in read_or_refused(lambda: load_results(path), path.name) or (): sound(r)


# ---- images

def jpeg(kind='JPEG', mode='RGB', size=(9, 7)):
    import io
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype='uint8')).convert(mode).save(f, kind)
    return f.getvalue()

@given(st.sampled_from(['JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM']), damage())
def test_a_damaged_image_is_an_image_or_refused_by_name(tmp_path_factory, kind, change):
    path = tmp_path_factory.getbasetemp()/'image'
    path.write_bytes(change(jpeg(kind)))
    found = read_or_refused(lambda: open_image(path), 'image')
    if found is not None: assert found.mode == 'RGB' and np.asarray(found).shape == (*found.size[::-1], 3)

file_names = st.text(st.characters(exclude_characters='/\x00', exclude_categories=['Cs']), min_size=1, max_size=12).filter(lambda s: s not in ('.', '..') and len(s.encode()) < 200)
contents = st.sampled_from(['image', 'image', 'image', 'image', 'empty', 'text', 'cut', 'link', 'loop', 'dangling', 'folder'])
HIDDEN = ('thumbs.db', 'desktop.ini', '__macosx')

def put(path, content):
    "A file of this kind."
    if path.exists() or path.is_symlink(): return
    data = dict(image=jpeg(), empty=b'', text=b'no image', cut=jpeg()[:100]).get(content)
    if data is not None: path.write_bytes(data)
    if content == 'link':
        (path.parents[3]/'else.jpg').write_bytes(jpeg())
        path.symlink_to(path.parents[3]/'else.jpg')
    if content == 'loop': path.symlink_to(path.parent, target_is_directory=True)
    if content == 'dangling': path.symlink_to('nowhere')
    if content == 'folder': path.mkdir()

trees_of_images = st.dictionaries(file_names, st.fixed_dictionaries({}, optional={s: st.dictionaries(file_names, st.dictionaries(file_names, contents, max_size=3), max_size=3) for s in ('train', 'test')}), max_size=2)

def good(tree):
    "Is everything there that a stream needs?"
    visible = lambda d: {k: v for k, v in d.items() if not k.startswith('.') and k.lower() not in HIDDEN}
    ok = lambda files: any(c in ('image', 'link') for c in visible(files).values())
    tasks = visible(tree)
    for t in tasks.values():
        if not {'train', 'test'} <= t.keys(): return False
        train, test = visible(t['train']), visible(t['test'])
        if not train or not test or set(test) - set(train) or not all(map(ok, [*train.values(), *test.values()])): return False
        spoken = [c.replace('_', ' ').strip() for c in train]
        if len(set(spoken)) < len(spoken) or not all(spoken): return False
    return bool(tasks) and all(t.strip() and min(t) >= ' ' for t in tasks)

usual = st.sampled_from(['Autos', 'Öl', '猫', 'a b', 'x_y', '.hidden', 'Thumbs.db', '-rf', "it's", 'ُعربي', '%s', '{}', '🐈'])
usual_trees = st.dictionaries(usual, st.fixed_dictionaries({s: st.dictionaries(usual, st.dictionaries(usual, contents, min_size=1, max_size=3), min_size=1, max_size=2) for s in ('train', 'test')}), min_size=1, max_size=2)
sound_trees = st.dictionaries(usual, st.lists(usual, min_size=1, max_size=3).flatmap(lambda cs: st.fixed_dictionaries({s: st.fixed_dictionaries({c: st.dictionaries(usual, contents, max_size=2).map(lambda f: {**f, 'a.jpg': 'image'}) for c in cs}) for s in ('train', 'test')})), min_size=1, max_size=2)

@given(st.one_of(trees_of_images, usual_trees, sound_trees))
def test_a_folder_of_any_shape_is_a_stream_of_its_good_images_or_refused_by_name(tree):
    with TemporaryDirectory() as d:
        root = Path(d)/'root'
        root.mkdir()
        for task, splits in tree.items():
            for split, classes in splits.items():
                for c, files in classes.items():
                    (root/task/split/c).mkdir(parents=True, exist_ok=True)
                    for name, content in files.items(): put(root/task/split/c/name, content)
            (root/task).mkdir(exist_ok=True)
        stream = read_or_refused(lambda: folder(root, size=8, cache=Path(d)/'cache'), root, *tree, 'task')
        if stream is None: assert not good(tree), 'a good folder was refused'
        else:
            assert good(tree)
            for t in stream:
                assert len(set(t.classes)) == len(t.classes) == len(set(t.train.labels.tolist()))
                for part in (t.train, t.test):
                    for i in range(len(part)): assert part[i][0].shape == (3, 8, 8) and part[i][0].isfinite().all()

@given(st.sampled_from(['templates.txt', 'classes.txt']), st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode), st.sampled_from([b'a: b', b'a photo of a {}.', b'a:', b'zz: b', b'{} {}', b'\xff\xfea\x00', b'\xef\xbb\xbfa: cat\n\n', b'a: {}', b'a photo of a {}.\n\x00'])))
def test_templates_and_class_names_of_any_bytes_are_read_or_refused_by_name(tmp_path_factory, name, data):
    d = tmp_path_factory.getbasetemp()
    for split in ('train', 'test'):
        (d/'names'/'task'/split/'a').mkdir(parents=True, exist_ok=True)
        (d/'names'/'task'/split/'a'/'x.jpg').write_bytes(jpeg())
    for other in ('templates.txt', 'classes.txt'): (d/'names'/'task'/other).unlink(missing_ok=True)
    (d/'names'/'task'/name).write_bytes(data)
    stream = read_or_refused(lambda: folder(d/'names', size=8, cache=d/'cache'), name, 'task')
    if stream: assert stream[0].classes[0].strip() and all(t.count('{}') == 1 for t in stream[0].templates)

@given(st.one_of(st.binary(max_size=60), odd.map(lambda v: repr(v).encode()), st.fixed_dictionaries({}, optional=dict(rule=odd, files=odd)).map(lambda v: json.dumps(v, default=str).encode() if all(not isinstance(x, int) or abs(x) < 2**70 for x in v.values()) else b'{}')))
@example(DEEP.encode())
def test_a_cache_of_any_content_changes_nothing(tmp_path_factory, content):
    d = tmp_path_factory.getbasetemp()
    for split in ('train', 'test'):
        (d/'cached'/'task'/split/'a').mkdir(parents=True, exist_ok=True)
        (d/'cached'/'task'/split/'a'/'x.jpg').write_bytes(jpeg())
        (d/'cached'/'task'/split/'a'/'bad.jpg').write_bytes(b'bad')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = folder(d/'cached', size=8, cache=d/'kept').info
        for f in (d/'kept').glob('*.json'): f.write_bytes(content)
        assert folder(d/'cached', size=8, cache=d/'kept').info == want and want['skipped'] == 2

@given(st.one_of(odd, st.data()))
def test_an_odd_few_shot_list_is_refused_by_name_or_is_one(tmp_path_factory, how):
    path, labels = tmp_path_factory.getbasetemp()/'list.json', [0, 0, 0, 1, 1, 1]
    path.unlink(missing_ok=True)
    saved_few_shot(path, labels, 2)
    value = how if not hasattr(how, 'draw') else how.draw(changed(json.loads(path.read_text())))
    try: path.write_text(json.dumps(value))
    except ValueError: assume(False)
    found = read_or_refused(lambda: saved_few_shot(path, labels, 2), 'list.json')
    if found is not None: assert np.bincount(np.array(labels)[found]).tolist() == [2, 2] and len(set(found)) == 4 and min(found) >= 0

@given(st.lists(st.one_of(st.integers(-2, 7), st.sampled_from([1.5, math.inf, True, None, '1', 10**400])), max_size=5))
@example([])
@example([0, 1])
@example([0, 1, 3, 3])
def test_positions_of_any_kind_are_refused_by_name_or_hold_as_many_of_each_class(tmp_path_factory, positions):
    path, labels = tmp_path_factory.getbasetemp()/'list.json', [0, 0, 0, 1, 1, 1]
    path.unlink(missing_ok=True)
    saved_few_shot(path, labels, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), 'positions': positions}))
    found = read_or_refused(lambda: saved_few_shot(path, labels, 2), 'list.json')
    if found is not None: assert found == positions and np.bincount(np.array(labels)[found]).tolist() == [2, 2] and len(set(found)) == 4 and min(found) >= 0

@given(damage())
def test_a_damaged_few_shot_list_is_refused_by_name_or_is_one(tmp_path_factory, change):
    path, labels = tmp_path_factory.getbasetemp()/'list.json', [0, 0, 0, 1, 1, 1]
    path.unlink(missing_ok=True)
    saved_few_shot(path, labels, 2)
    path.write_bytes(change(path.read_bytes()))
    found = read_or_refused(lambda: saved_few_shot(path, labels, 2), 'list.json')
    if found is not None: assert np.bincount(np.array(labels)[found]).tolist() == [2, 2]

@given(st.binary(max_size=30))
@example(b'')
@example(b'\n \n')
def test_captions_of_any_bytes_are_read_or_refused_by_name(tmp_path_factory, data):
    d = tmp_path_factory.getbasetemp()/'reference'
    d.mkdir(exist_ok=True)
    (d/'x.jpg').write_bytes(jpeg())
    (d/'captions.txt').write_bytes(data)
    found = read_or_refused(lambda: from_folder(d, 2, size=8), 'captions.txt')
    if found: assert len(found[1]) == len(found[0]) and all(s.strip() for s in found[1])


# ---- checkpoints of others

@given(st.one_of(odd, st.dictionaries(st.one_of(st.sampled_from(theirs.NEEDED), st.text(max_size=5)), st.one_of(st.just(torch.ones(4, 4)), st.just(torch.ones(2, 3, 4, 4)), st.just(torch.zeros(0)), odd), max_size=12)), st.booleans())
def test_a_checkpoint_of_any_content_is_converted_or_refused(state, wrapped):
    try: released.from_moe_adapters4cl(dict(state_dict=state) if wrapped else state)
    except ValueError as e: assert type(e) is ValueError and str(e)
    else: raise AssertionError('it cannot be a model of MoE-Adapters4CL')

THEIRS = {**dict.fromkeys(theirs.NEEDED, (8, 8)), 'visual.conv1.weight': (8, 3, 4, 4), 'visual.positional_embedding': (5, 8), 'token_embedding.weight': (20, 8)}

@given(st.dictionaries(st.sampled_from(theirs.NEEDED), st.lists(st.integers(0, 9), max_size=4), max_size=2), st.sampled_from([None, 'visual.transformer.resblocks.999999999.x', 'transformer.resblocks.0.adaptmlp_list.7.x', 'visual.transformer.resblocks.0.router_list.88888888888888888888']), st.sampled_from([None, 1, 2, 3, 0, -1]))
def test_tensors_of_any_shapes_under_their_names_are_refused(shapes, name, heads):
    state = {n: torch.ones(s) for n, s in {**THEIRS, **shapes, **({name: (1,)} if name else {})}.items()}
    with pytest.raises(ValueError) as e: released.from_moe_adapters4cl(state, vision_heads=heads, text_heads=heads)
    assert type(e.value) is ValueError and any(w in str(e.value) for w in ('visual', 'text', 'checkpoint', 'heads', 'transformer', 'positional', 'token', 'CLIP', 'top_k'))

@given(st.sampled_from(['x.pt', 'x.pth', 'x.safetensors', 'x']), damage())
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path_factory, name, change):
    d = tmp_path_factory.getbasetemp()
    state = {'visual.proj': torch.ones(3, 3)}
    torch.save(state, d/name) if not name.endswith('safetensors') else save_file(state, d/name)
    (d/name).write_bytes(change((d/name).read_bytes()))
    found = read_or_refused(lambda: theirs.read_checkpoint(d/name), name)
    assert found is None or isinstance(found, dict)

@given(damage())
def test_damaged_weights_of_a_backbone_are_refused_by_name(tmp_path_factory, change):
    path, model = tmp_path_factory.getbasetemp()/'weights.safetensors', torch.nn.Linear(3, 2)
    write_weights(model, path)
    path.write_bytes(change(path.read_bytes()))
    read_or_refused(lambda: read_weights(model, path), 'weights.safetensors')


# ---- a flipped bit

def flipped(path, where, bit):
    "Flip one bit of a file; at the end of the file are the numbers."
    data = bytearray(path.read_bytes())
    data[min(int(where * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(bytes(data))

@given(st.floats(0, 1), st.integers(0, 7))
@example(1., 0)
def test_a_flipped_bit_in_a_checkpoint_is_detected(tmp_path_factory, where, bit):
    path = write_tree(TREE, tmp_path_factory.getbasetemp()/'flip.safetensors')
    flipped(path, where, bit)
    refused(lambda: read_tree(path), 'flip.safetensors')

@given(st.sampled_from([*FILES, SUMS]), st.floats(0, 1), st.integers(0, 7))
@example('matrix.csv', .99, 0)
def test_a_flipped_bit_in_a_run_directory_is_detected(tmp_path_factory, name, where, bit):
    d = run_directory(tmp_path_factory.getbasetemp(), sums=True)
    flipped(d/name, where, bit)
    refused(lambda: load_result(d, adapters=True), *(FILES if name == SUMS else [name]), SUMS)

@given(st.floats(0, 1), st.integers(0, 7))
@example(.9, 0)
def test_a_flipped_bit_in_a_shared_file_is_detected(tmp_path_factory, shared, where, bit):
    path = tmp_path_factory.getbasetemp()/'flip.safetensors'
    path.write_bytes(shared['checked'].read_bytes())
    flipped(path, where, bit)
    refused(lambda: share.load(path, (shared['clip'], None)), 'flip.safetensors', path.parent)


# ---- settings

MERGE = dict(every=10, until=.75, window='task', n_sources=2, frozen_sources=True, protect=False, combine='mean', align=False, router='keep', reset_optimizer=True)

@given(st.sampled_from(sorted(MERGE)), odd)
@example('align', 'no')
@example('combine', 'os.path')
def test_a_merge_rule_is_of_its_kind_or_refused_by_name(name, value):
    try: rule = Merge(**{**MERGE, name: value})
    except ValueError as e:
        assert f'merge.{name}' in str(e)
        return
    if name in ('every', 'n_sources'): assert value is None or type(value) is int and value >= 1
    if name in ('frozen_sources', 'protect', 'align', 'reset_optimizer'): assert type(value) is bool
    if name == 'until': assert 0 < value <= 1
    if name == 'combine': assert callable(rule.combine) or rule.combine in ('mean', 'usage_weighted') or '.' in value

TRAIN = dict(iterations=50, batch=8, lr=1e-3, warmup=5, label_smoothing=.2, weight_decay=0., betas=(.9, .999), workers=0, micro_batch=None, precision='fp32')

@given(st.sampled_from(sorted(TRAIN)), odd)
@example('lr', math.nan)
@example('iterations', 'a')
@example('batch', 1.5)
@example('betas', (2, 3))
def test_settings_of_training_are_of_their_kind_or_refused_by_name(name, value):
    try: Train(**{**TRAIN, name: value})
    except ValueError as e:
        assert f'train.{name}' in str(e) or name == 'iterations' and 'train.warmup' in str(e)
        return
    if name in ('iterations', 'batch', 'micro_batch'): assert value is None and name == 'micro_batch' or type(value) is int and value >= 1
    if name in ('warmup', 'workers'): assert type(value) is int and value >= 0
    if name in ('label_smoothing', 'weight_decay'): assert type(value) in (int, float) and 0 <= value < math.inf
    if name == 'lr': assert type(value) in (int, float) and 0 < value < math.inf or isinstance(value, dict) and all(0 < v < math.inf for v in value.values())
    if name == 'betas': assert len(value) == 2 and all(0 <= b < 1 for b in value)

EXPERTS = dict(n_experts=4, rank=2, top_k=2, scale=.1, dropout=.1, shared_init=False, gate='top_k', top_p=.4)

@given(st.sampled_from(sorted(EXPERTS)), odd)
@example('scale', math.nan)
@example('scale', 'abc')
@example('shared_init', 'no')
@example('n_experts', True)
def test_settings_of_experts_are_of_their_kind_or_refused_by_name(name, value):
    try: check_sizes(**{**EXPERTS, name: value})
    except ValueError as e:
        assert name in str(e)
        return
    if name in ('n_experts', 'rank', 'top_k'): assert type(value) is int and value >= (name != 'n_experts')
    if name in ('scale', 'dropout', 'top_p'): assert type(value) in (int, float) and math.isfinite(value)
    if name == 'shared_init': assert type(value) is bool
    if name == 'gate': assert value in ('top_k', 'top_p')

REFUSED = ['train.iterations=1e400', 'train.lr=nan', 'train.lr=[1,2]', 'train.betas=5', 'experts.scale=abc', 'experts.gate=[1]', 'experts.shared_init=maybe', 'train=5', 'merge=5', 'freeze=5', 'freeze.n=-1', 'merge.every=abc', 'merge.align=maybe', 'experts.rank=1.5', 'selectors=5', 'selectors=abc', 'predict=[a]', 'seed=abc', 'seed=1.5', 'seed=-5', 'seed=99999999999999999999', 'seed=nan',
           'threads=0', 'train.nope=3', 'nope=1', 'stream=nope', 'method=nope', 'stream.n_classes=99', 'device=nope']

@pytest.mark.parametrize('override', REFUSED)
def test_an_odd_setting_on_the_command_line_is_refused_and_named(monkeypatch, override):
    def trains(*args): raise AssertionError('it would have been trained')
    monkeypatch.setattr(job, 'run', trains)
    with pytest.raises((job.UsageError, HydraException)) as e: job.job(composed('stream=toy', 'model=random', override), progress=False)
    assert override.split('=')[0].split('.')[-1] in str(e.value)
