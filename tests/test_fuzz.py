"""Everything that reads files from outside is given files that are broken, foreign or hostile.

It must read them rightly or refuse them: a ValueError or FileNotFoundError that names the file. Never another
exception, never a pickle, never an answer made of what is not there.

`pytest --hypothesis-profile=hunt tests/test_fuzz.py` looks for new cases, 50 times as many (tests/conftest.py)."""
import copy
import gzip
import io
import json
import math
import pickle
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np
import pandas as pd
import pytest
import torch
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings, strategies as st
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from moe_merge_nb.baselines.zscl import from_folder
from moe_merge_nb.clip.backbone import read_weights, write_weights
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.router import GATES
from moe_merge_nb.learn.pack import load_results, pack, unpack
from moe_merge_nb.learn.results import TABLES, example_result, summary
from moe_merge_nb.learn.saved import SUMS, load_result, save_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.run import job, released, share
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.theirs import NEEDED
from moe_merge_nb.safe.checkpoint import FORMAT, checksum, read_tree, write_tree
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.images import open_image, saved_few_shot

DEEP = '[' * 100_000


# ---- what is done to files

NUMBERS = [0, -1, 1, 10**9, 2**63, 10**400, -0.5, 1e308, math.nan, math.inf]
WORDS = ['', 'x', '../..', 'os.system', 'a' * 5000]
NESTS = [[], {}, [[]], {'a': 1}, [None]]
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*NUMBERS, *WORDS, *NESTS]),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
)

DAMAGES = {  # of the bytes d, at i, n long, with junk
    'cut': lambda d, i, n, junk: d[:i],
    'delete': lambda d, i, n, junk: d[:i] + d[i + n:],
    'repeat': lambda d, i, n, junk: d[:i] + d[i:i + n] + d[i:],
    'insert': lambda d, i, n, junk: d[:i] + junk + d[i:],
    'zero': lambda d, i, n, junk: d[:i] + bytes(min(n, len(d) - i)) + d[i + n:],
    'all': lambda d, i, n, junk: junk,
}

def flip(data, where, bit):
    "One bit of the bytes is another."
    out = bytearray(data)
    out[min(int(where * len(out)), len(out) - 1)] ^= 1 << bit
    return bytes(out)

@st.composite
def damage(draw):
    "A way to damage bytes: cut, flip, delete, repeat, insert, replace."
    kind = draw(st.sampled_from(['flip', *DAMAGES]))
    at, n = draw(st.floats(0, 1)), draw(st.integers(1, 40))
    junk = draw(st.binary(max_size=60))
    bits = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=6))
    def change(data):
        if kind != 'flip': return DAMAGES[kind](data, int(at * len(data)), n, junk)
        for where, bit in bits: data = flip(data, where, bit)
        return data
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

class Canary:
    "Unpickling it leaves a file."
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')

def write_json(path, value):
    "Write it, if json can: some numbers it cannot."
    try: text = json.dumps(value)
    except ValueError: assume(False)
    path.write_text(text)


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
    "It refuses, by name."
    assert read_or_refused(read, *names) is None


# ---- trees

TREE = dict(
    done=3,
    weights={'a': torch.arange(6.).view(2, 3), 'b': torch.zeros(0, 2)},
    events=[dict(kind='merge', loss=.25)],
    n=None,
)

def tree_bytes(d):
    return write_tree(TREE, d/'tree.safetensors').read_bytes()

@given(damage())
def test_a_damaged_tree_is_read_or_refused_by_name(tmp_path_factory, change):
    d = tmp_path_factory.getbasetemp()
    data = tree_bytes(d)
    bad = change(data)
    (d/'bad.safetensors').write_bytes(bad)
    found = read_or_refused(lambda: read_tree(d/'bad.safetensors'), 'bad.safetensors')
    if len(bad) < len(data): assert found is None, 'a file that is too short was read'

@given(st.floats(0, 1, exclude_max=True))
def test_a_tree_that_is_cut_anywhere_is_refused(tmp_path_factory, at):
    d = tmp_path_factory.getbasetemp()
    data = tree_bytes(d)
    (d/'cut.safetensors').write_bytes(data[:int(at * len(data))])
    refused(lambda: read_tree(d/'cut.safetensors'), 'cut.safetensors')

def inner(inside):
    "Lists and dictionaries of these nodes."
    keys = st.sampled_from(['tensor', 'dict', 'x'])
    return st.one_of(st.lists(inside, max_size=3), st.dictionaries(keys, inside, max_size=2))

nodes = st.recursive(odd, inner, max_leaves=6)

@given(nodes, st.integers(0, 2))
@example({'tensor': ['t0']}, 1)
@example({'dict': [1]}, 0)
def test_a_tree_of_any_json_is_read_or_refused_by_name(tmp_path_factory, tree, n):
    path = tmp_path_factory.getbasetemp()/'odd.safetensors'
    try: text = json.dumps(tree)
    except ValueError: assume(False)  # a number that json cannot write
    tensors = {f't{i}': torch.ones(2) for i in range(n)}
    save_file(tensors, path, dict(format=FORMAT, tree=text, sha256=checksum(text, tensors)))
    read_or_refused(lambda: read_tree(path), 'odd.safetensors')

kinds = st.one_of(st.sampled_from(['F32', 'BOOL', 'F8_E4M3', 'U64', 'nope']), odd)
shapes = st.one_of(st.lists(st.one_of(st.integers(-1, 4), st.integers()), max_size=3), odd)
offsets = st.one_of(st.lists(st.integers(-1, 40), min_size=2, max_size=2), odd)
entries = st.one_of(odd, st.fixed_dictionaries(dict(dtype=kinds, shape=shapes, data_offsets=offsets)))
headers = st.dictionaries(st.sampled_from(['__metadata__', 't0', 'a']), entries).map(json.dumps).map(str.encode)
lengths = st.one_of(st.none(), st.integers(0, 2**64 - 1))

@given(st.one_of(st.binary(max_size=200), headers), lengths, st.binary(max_size=40))
@example(DEEP.encode(), None, b'')
@example(b'{"a":' * 10_000, None, b'')
@example(b'{}', 2**63, b'')
def test_a_safetensors_file_of_any_header_is_read_or_refused_by_name(tmp_path_factory, text, length, body):
    path = tmp_path_factory.getbasetemp()/'header.safetensors'
    if length is None: length = len(text)
    path.write_bytes(struct.pack('<Q', length) + text + body)
    for read in (read_tree, share.load, share.read_header, released.read_checkpoint):
        read_or_refused(lambda: read(path), 'header.safetensors', path.parent)

def test_json_of_any_depth_is_refused(tmp_path):
    d, path = run_directory(tmp_path), tmp_path/'deep.safetensors'
    for name in ('config.json', 'timings.json', 'events.jsonl'):
        good = (d/name).read_bytes()
        (d/name).write_text(DEEP)
        refused(lambda: load_result(d), name)
        (d/name).write_bytes(good)
    for key, read in (('tree', read_tree), (share.KEY, share.load)):
        save_file({}, path, {'format': FORMAT, 'sha256': checksum(DEEP, {}), key: DEEP})
        refused(lambda: read(path), 'deep.safetensors')


# ---- nothing is unpickled

READERS = [
    ('x.safetensors', read_tree),
    ('x.safetensors', share.load),
    ('x.safetensors', released.read_checkpoint),
    ('x.pt', released.read_checkpoint),
    ('x.pth', released.read_checkpoint),
    ('x.csv.gz', unpack),
    ('x.csv', unpack),
    ('x.png', open_image),
    ('x.json', lambda p: saved_few_shot(p, [0, 1], 1)),
]
FILES = [*(f'{t}.csv' for t in TABLES), 'config.json', 'events.jsonl', 'timings.json', 'adapters.safetensors']

def bombs(d, canary):
    "Files that unpickle the canary, if somebody does."
    torch.save({'state_dict': canary}, d/'bomb.pt')
    np.save(d/'bomb.npy', np.array([canary], dtype=object), allow_pickle=True)
    plain = pickle.dumps(canary)
    return [plain, (d/'bomb.pt').read_bytes(), gzip.compress(plain), (d/'bomb.npy').read_bytes()]

def test_no_reader_unpickles(tmp_path):
    hatched = tmp_path/'hatched'
    canary = Canary(hatched)
    for data in bombs(tmp_path, canary):
        for name, read in READERS:
            (tmp_path/name).write_bytes(data)
            refused(lambda: read(tmp_path/name), name)
        for name in FILES:
            d = run_directory(tmp_path)
            (d/name).write_bytes(data)
            refused(lambda: load_result(d, adapters=True), name)
            (d/name).unlink()
    assert not hatched.exists()
    pickle.loads(pickle.dumps(canary))  # the trap itself works
    assert hatched.exists()


# ---- shared adapters

VISION = CLIPVisionCfg(image_size=8, patch_size=4, width=8, layers=1, head_width=4)
TEXT = CLIPTextCfg(context_length=6, vocab_size=20, width=8, heads=2, layers=1)

def tiny_clip():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIP(8, VISION, TEXT).eval()

@dataclass(repr=False) # not worth being shown when a test fails
class Shared:
    "Adapters of two tasks in a file; the backbone is given, or in the file."
    clip: CLIP
    checked: Path # as it is written: with a checksum, which would find everything first
    given: Path # without one
    header: dict
    tensors: dict[str, Tensor]
    header_inside: dict # of the file that has the backbone in it
    tensors_inside: dict[str, Tensor]

    def load(self, path):
        "The adapters in another file, on the same backbone."
        return share.load(path, (self.clip, None))

def unchecked(path):
    "Take the checksum out of the header, as earlier versions wrote it."
    text = json.dumps({**share.read_header(path), 'version': 1})
    save_file(load_file(path), path, {share.KEY: text})
    return path

@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    d, clip, torch_state = tmp_path_factory.mktemp('shared'), tiny_clip(), torch.get_rng_state()
    model = AdaptedCLIP(clip, n_experts=3, rank=2, top_k=2)
    for _ in range(2): model.add_task()
    tasks = [share.Words('one', ('cat', 'dog'), ('a {}.',)), share.Words('two', ('ship',), ('a {}.',))]
    given_ = share.save(model, d/'given.safetensors', name='tiny', tasks=tasks)
    inside = share.save(model, d/'inside.safetensors', tasks=tasks, with_backbone=True)
    torch.set_rng_state(torch_state)
    checked = d/'checked.safetensors'
    checked.write_bytes(given_.read_bytes())
    for path in (given_, inside): unchecked(path)
    return Shared(
        clip=clip,
        checked=checked,
        given=given_,
        header=share.read_header(given_),
        tensors=load_file(given_),
        header_inside=share.read_header(inside),
        tensors_inside=load_file(inside),
    )

def usable(found, tensors):
    "Whoever gets adapters can encode with every task there is, and gets numbers."
    if found is None: return
    routers = {k.rsplit('.', 1)[0] for k in tensors if k.startswith('0.') and '.routers.' in k}
    assert found.model.n_tasks == len(routers)
    image = torch.ones(1, 3, 8, 8)
    for task in range(found.model.n_tasks):
        assert found.model.encode_image(image, task).isfinite().all()
    for t in found.tasks:
        assert isinstance(t.name, str)
        assert t.classes is None or all(isinstance(c, str) for c in t.classes)

@given(data=st.data())
def test_a_shared_file_with_an_odd_header_is_usable_or_refused_by_name(tmp_path_factory, shared, data):
    path = tmp_path_factory.getbasetemp()/'odd.safetensors'
    try: text = json.dumps(data.draw(changed(shared.header)))
    except ValueError: assume(False)
    save_file(shared.tensors, path, {share.KEY: text})
    usable(read_or_refused(lambda: shared.load(path), 'odd.safetensors'), shared.tensors)

@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(data=st.data())
def test_a_shared_file_with_an_odd_description_of_its_backbone_is_usable_or_refused_by_name(
    tmp_path_factory, shared, data):
    path, header = tmp_path_factory.getbasetemp()/'odd.safetensors', shared.header_inside
    backbone = {**header['backbone'], 'config': data.draw(changed(header['backbone']['config']))}
    try: text = json.dumps({**header, 'backbone': backbone})
    except ValueError: assume(False)
    save_file(shared.tensors_inside, path, {share.KEY: text})
    usable(read_or_refused(lambda: share.load(path), 'odd.safetensors'), shared.tensors)

@given(st.sampled_from(['gone', 'more', 'shape', 'kind', 'nan', 'renamed']), st.data())
def test_a_shared_file_with_other_tensors_is_refused_and_names_one(tmp_path_factory, shared, how, data):
    path, tensors = tmp_path_factory.getbasetemp()/'odd.safetensors', dict(shared.tensors)
    name = data.draw(st.sampled_from(sorted(k for k, t in tensors.items() if t.is_floating_point())))
    t = tensors[name]
    if how in ('gone', 'renamed'): del tensors[name]
    if how == 'renamed': tensors[name + 'x'] = t
    if how == 'shape': tensors[name] = t[..., None]
    if how == 'kind': tensors[name] = t.int()
    if how == 'nan': tensors[name] = torch.full_like(t, data.draw(st.sampled_from([math.nan, math.inf])))
    if how == 'more':
        name = 'else'
        tensors[name] = torch.ones(1)
    save_file(tensors, path, {share.KEY: json.dumps(shared.header)})
    says = 'odd.safetensors: .*does not fit.*' + name
    with pytest.raises(ValueError, match=says): shared.load(path)

@given(damage())
def test_a_damaged_shared_file_is_usable_or_refused_by_name(tmp_path_factory, shared, change):
    path = tmp_path_factory.getbasetemp()/'bad.safetensors'
    good = shared.given.read_bytes()
    bad = change(good)
    path.write_bytes(bad)
    found = read_or_refused(lambda: shared.load(path), 'bad.safetensors', path.parent)
    if len(bad) < len(good): assert found is None
    usable(found, shared.tensors)

CONFIG = ['experts', 'tasks', 'model', 'pretrained', 'version']

@given(st.one_of(odd, st.dictionaries(st.sampled_from(CONFIG), odd)))
def test_adapters_of_a_run_with_an_odd_configuration_are_usable_or_refused_by_name(tmp_path_factory, shared, config):
    d = tmp_path_factory.getbasetemp()/'run'
    d.mkdir(exist_ok=True)
    save_file(shared.tensors, d/'adapters.safetensors')
    base = dict(experts=shared.header['experts'], tasks=['one', 'two'])
    write_json(d/'config.json', {**base, **config} if isinstance(config, dict) else config)
    usable(read_or_refused(lambda: shared.load(d), d), shared.tensors)


# ---- run directories

def run_directory(d, sums=False):
    """Without checksums, as earlier versions wrote it: they would find all that is done to its files before anybody
    reads them."""
    d = d/('summed' if sums else 'run')
    r = example_result(n_tasks=2, n_experts=3)
    r.adapters = {'a': torch.ones(3)}
    save_result(r, d)
    if not sums: (d/SUMS).unlink()
    return d

def sound(r):
    """A result that was read is one that can be shown: its metrics are numbers from 0 to 100, or their absence is an
    error."""
    if r is None: return
    assert isinstance(r.config, dict) and isinstance(r.timings, dict)
    assert all(isinstance(e, dict) for e in r.events)
    assert {name: list(getattr(r, name).columns) for name in TABLES} == TABLES
    try: numbers = summary(r)[['Transfer', 'Average', 'Last']].to_numpy(float)
    except ValueError as e: assert 'selector' in str(e) or 'square' in str(e), e
    else: assert ((numbers >= 0) & (numbers <= 100) | np.isnan(numbers)).all()

@given(st.sampled_from(FILES), damage())
def test_a_damaged_run_directory_is_sound_or_refused_by_name(tmp_path_factory, name, change):
    d = run_directory(tmp_path_factory.getbasetemp())
    (d/name).write_bytes(change((d/name).read_bytes()))
    sound(read_or_refused(lambda: load_result(d, adapters=True), name))

@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_a_file_of_a_run_that_is_cut_is_refused_unless_between_two_lines(tmp_path_factory, name, at):
    d = run_directory(tmp_path_factory.getbasetemp())
    data = (d/name).read_bytes()
    cut = data[:int(at * len(data))]
    (d/name).write_bytes(cut)
    found = read_or_refused(lambda: load_result(d, adapters=True), name)
    if found is None: return
    assert name.endswith(('.csv', '.jsonl'))
    assert not cut or cut.endswith(b'\n')

NUMERALS = ['-1', '101', '0.5', '1e400', '1_0', '0x10', ' 3', '１', '999999999999999999999', 'nan', 'inf', '-inf']
CELLS = ['', 'x', 'Aircraft', '"', '\x00', ',', 'True', *NUMERALS]
COUNTED = ('count', 'block', 'expert')

@given(st.sampled_from(sorted(TABLES)), st.data())
def test_a_table_with_an_odd_cell_is_sound_or_refused_by_name(tmp_path_factory, table, data):
    d = run_directory(tmp_path_factory.getbasetemp())
    path = d/f'{table}.csv'
    rows = path.read_text().splitlines()
    i = data.draw(st.integers(0, len(rows) - 1))
    j = data.draw(st.integers(0, len(TABLES[table]) - 1))
    row = rows[i].split(',')
    row[j] = data.draw(st.one_of(st.sampled_from(CELLS), st.text(max_size=4)))
    rows[i] = ','.join(row)
    path.write_text('\n'.join(rows) + '\n', encoding='utf-8', errors='replace')
    found = read_or_refused(lambda: load_result(d), path.name)
    sound(found)
    if not found: return
    for name in COUNTED:
        if name not in TABLES[table]: continue
        column = getattr(found, table)[name]
        assert column.dtype.kind == 'i' and (column >= 0).all()

@given(st.sampled_from(['config.json', 'timings.json', 'events.jsonl']), odd)
def test_json_of_another_kind_in_a_run_directory_is_refused_by_name(tmp_path_factory, name, value):
    d = run_directory(tmp_path_factory.getbasetemp())
    short = not isinstance(value, int) or abs(value) < 2**70
    (d/name).write_text(json.dumps(value) + '\n' if short else '{}x\n')
    if not isinstance(value, dict) or name == 'config.json': refused(lambda: load_result(d), name)

odd_or_task = st.one_of(odd, st.sampled_from(['Aircraft', 'Caltech']))

@given(st.one_of(odd, st.lists(odd_or_task, max_size=3)))
def test_tasks_of_another_kind_in_a_configuration_are_sound_or_refused(tmp_path_factory, tasks):
    d = run_directory(tmp_path_factory.getbasetemp())
    config = json.loads((d/'config.json').read_text())
    write_json(d/'config.json', {**config, 'tasks': tasks})
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

names = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=6)  # `Task` refuses the others

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
    runs = [example_result(name, seed, n_tasks=2, n_experts=3) for seed, name in enumerate(['moe', 'moe_merge'])]
    pack(runs, path)
    path.write_bytes(change(path.read_bytes()))
    for r in read_or_refused(lambda: load_results(path), path.name) or (): sound(r)


# ---- images

def jpeg(kind='JPEG'):
    "Noise of 9 x 7 pixels."
    f, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype='uint8')
    Image.fromarray(pixels).save(f, kind)
    return f.getvalue()

@given(st.sampled_from(['JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP', 'PPM']), damage())
def test_a_damaged_image_is_an_image_or_refused_by_name(tmp_path_factory, kind, change):
    path = tmp_path_factory.getbasetemp()/'image'
    path.write_bytes(change(jpeg(kind)))
    found = read_or_refused(lambda: open_image(path), 'image')
    if found is None: return
    assert found.mode == 'RGB'
    assert np.asarray(found).shape == (*found.size[::-1], 3)

def is_file_name(s):
    return s not in ('.', '..') and len(s.encode()) < 200

characters = st.characters(exclude_characters='/\x00', exclude_categories=['Cs'])
file_names = st.text(characters, min_size=1, max_size=12).filter(is_file_name)
contents = st.sampled_from([*['image'] * 4, 'empty', 'text', 'cut', 'link', 'loop', 'dangling', 'folder'])
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

def visible(d):
    return {k: v for k, v in d.items() if not k.startswith('.') and k.lower() not in HIDDEN}

def good_task(t):
    "Are there training and test images of every class, and are the classes different in prompts?"
    if not {'train', 'test'} <= t.keys(): return False
    train, test = visible(t['train']), visible(t['test'])
    if not train or not test or set(test) - set(train): return False
    for files in (*train.values(), *test.values()):
        if not {'image', 'link'} & set(visible(files).values()): return False
    spoken = [c.replace('_', ' ').strip() for c in train]
    return len(set(spoken)) == len(spoken) and all(spoken)

def good(tree):
    "Is everything there that a stream needs?"
    tasks = visible(tree)
    if not tasks or not all(map(good_task, tasks.values())): return False
    return all(t.strip() and min(t) >= ' ' for t in tasks)

def splits(classes):
    "Training and test images, each of these classes."
    return dict(train=classes, test=classes)

some_files = st.dictionaries(file_names, contents, max_size=3)
some_classes = st.dictionaries(file_names, some_files, max_size=3)
some_splits = st.fixed_dictionaries({}, optional=splits(some_classes))
trees_of_images = st.dictionaries(file_names, some_splits, max_size=2)

NAMES = ['Autos', 'Öl', '猫', 'a b', 'x_y', '.hidden', 'Thumbs.db', '-rf', "it's", 'ُعربي', '%s', '{}', '🐈']
usual = st.sampled_from(NAMES)
usual_files = st.dictionaries(usual, contents, min_size=1, max_size=3)
usual_classes = st.dictionaries(usual, usual_files, min_size=1, max_size=2)
usual_trees = st.dictionaries(usual, st.fixed_dictionaries(splits(usual_classes)), min_size=1, max_size=2)

sound_files = st.dictionaries(usual, contents, max_size=2).map(lambda files: {**files, 'a.jpg': 'image'})

def sound_splits(classes):
    "The same classes in both, with an image each."
    return st.fixed_dictionaries(splits(st.fixed_dictionaries({c: sound_files for c in classes})))

sound_classes = st.lists(usual, min_size=1, max_size=3)
sound_trees = st.dictionaries(usual, sound_classes.flatmap(sound_splits), min_size=1, max_size=2)

def planted(root, tree):
    "These folders and files."
    root.mkdir()
    for task, parts in tree.items():
        (root/task).mkdir(exist_ok=True)
        for split, classes in parts.items():
            for c, files in classes.items():
                (root/task/split/c).mkdir(parents=True, exist_ok=True)
                for name, content in files.items(): put(root/task/split/c/name, content)

def whole(images):
    "Every image can be shown."
    for i in range(len(images)):
        pixels = images[i][0]
        assert pixels.shape == (3, 8, 8) and pixels.isfinite().all()

@given(st.one_of(trees_of_images, usual_trees, sound_trees))
def test_a_folder_of_any_shape_is_a_stream_of_its_good_images_or_refused_by_name(tree):
    with TemporaryDirectory() as d:
        root = Path(d)/'root'
        planted(root, tree)
        stream = read_or_refused(lambda: folder(root, size=8, cache=Path(d)/'cache'), root, *tree, 'task')
        assert (stream is not None) == good(tree)
        for t in stream or ():
            assert len(set(t.classes)) == len(t.classes) == len(set(t.train.labels.tolist()))
            whole(t.train)
            whole(t.test)

def one_class(root, **files):
    "A folder with one task of one class: these files are its images, in both splits."
    for split in ('train', 'test'):
        d = root/'task'/split/'a'
        d.mkdir(parents=True, exist_ok=True)
        for name, data in files.items(): (d/f'{name}.jpg').write_bytes(data)

LINES = [
    b'a: b',
    b'a photo of a {}.',
    b'a:',
    b'zz: b',
    b'{} {}',
    b'\xff\xfea\x00',
    b'\xef\xbb\xbfa: cat\n\n',
    b'a: {}',
    b'a photo of a {}.\n\x00',
]
texts = st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode), st.sampled_from(LINES))

@given(st.sampled_from(['templates.txt', 'classes.txt']), texts)
def test_templates_and_class_names_of_any_bytes_are_read_or_refused_by_name(tmp_path_factory, name, data):
    d = tmp_path_factory.getbasetemp()
    root = d/'names'
    one_class(root, x=jpeg())
    for other in ('templates.txt', 'classes.txt'): (root/'task'/other).unlink(missing_ok=True)
    (root/'task'/name).write_bytes(data)
    stream = read_or_refused(lambda: folder(root, size=8, cache=d/'cache'), name, 'task')
    if not stream: return
    assert stream[0].classes[0].strip()
    assert all(t.count('{}') == 1 for t in stream[0].templates)

caches = st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: b'SQLite format 3\0' + b))

@given(caches)
@example(DEEP.encode())
def test_a_cache_of_any_content_changes_nothing(tmp_path_factory, content):
    d = tmp_path_factory.getbasetemp()
    one_class(d/'cached', x=jpeg(), bad=b'bad')
    read = lambda: folder(d/'cached', size=8, cache=d/'kept').info
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want = read()
        [file] = (d/'kept').glob('*.sqlite3')
        file.write_bytes(content)
        assert read() == want and want['skipped'] == 2

LABELS = [0, 0, 0, 1, 1, 1]

def few_shot_list(tmp_path_factory):
    "Where a list of two images of each class is saved."
    path = tmp_path_factory.getbasetemp()/'list.json'
    path.unlink(missing_ok=True)
    saved_few_shot(path, LABELS, 2)
    return path

def read_list(path):
    "The positions in it, two of each class; None if it is refused."
    found = read_or_refused(lambda: saved_few_shot(path, LABELS, 2), 'list.json')
    if found is None: return None
    assert np.bincount(np.array(LABELS)[found]).tolist() == [2, 2]
    return found

def no_position_twice(found):
    "Every position is another one, from the beginning."
    assert len(set(found)) == 4 and min(found) >= 0

@given(st.one_of(odd, st.data()))
def test_an_odd_few_shot_list_is_refused_by_name_or_is_one(tmp_path_factory, how):
    path = few_shot_list(tmp_path_factory)
    write_json(path, how.draw(changed(json.loads(path.read_text()))) if hasattr(how, 'draw') else how)
    found = read_list(path)
    if found is not None: no_position_twice(found)

@given(st.lists(st.one_of(st.integers(-2, 7), st.sampled_from([1.5, math.inf, True, None, '1', 10**400])), max_size=5))
@example([])
@example([0, 1])
@example([0, 1, 3, 3])
def test_positions_of_any_kind_are_refused_by_name_or_hold_as_many_of_each_class(tmp_path_factory, positions):
    path = few_shot_list(tmp_path_factory)
    path.write_text(json.dumps({**json.loads(path.read_text()), 'positions': positions}))
    found = read_list(path)
    if found is None: return
    assert found == positions
    no_position_twice(found)

@given(damage())
def test_a_damaged_few_shot_list_is_refused_by_name_or_is_one(tmp_path_factory, change):
    path = few_shot_list(tmp_path_factory)
    path.write_bytes(change(path.read_bytes()))
    read_list(path)

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

their_names = st.one_of(st.sampled_from(NEEDED), st.text(max_size=5))
TENSORS = [torch.ones(4, 4), torch.ones(2, 3, 4, 4), torch.zeros(0)]
odd_or_tensor = st.one_of(*map(st.just, TENSORS), odd)

@given(st.one_of(odd, st.dictionaries(their_names, odd_or_tensor, max_size=12)), st.booleans())
def test_a_checkpoint_of_any_content_is_converted_or_refused(state, wrapped):
    try: released.from_moe_adapters4cl(dict(state_dict=state) if wrapped else state)
    except ValueError as e: assert type(e) is ValueError and str(e)
    else: raise AssertionError('it cannot be a model of MoE-Adapters4CL')

THEIRS = {
    **dict.fromkeys(NEEDED, (8, 8)),
    'visual.conv1.weight': (8, 3, 4, 4),
    'visual.positional_embedding': (5, 8),
    'token_embedding.weight': (20, 8),
}
MORE = [
    None,
    'visual.transformer.resblocks.999999999.x',
    'transformer.resblocks.0.adaptmlp_list.7.x',
    'visual.transformer.resblocks.0.router_list.88888888888888888888',
]
REASONS = ['visual', 'text', 'checkpoint', 'heads', 'transformer', 'positional', 'token', 'CLIP', 'top_k']
other_shapes = st.dictionaries(
    st.sampled_from(NEEDED), st.lists(st.integers(0, 9), max_size=4), max_size=2)

@given(other_shapes, st.sampled_from(MORE), st.sampled_from([None, 1, 2, 3, 0, -1]))
def test_tensors_of_any_shapes_under_their_names_are_refused(shapes, name, heads):
    state = {n: torch.ones(shape) for n, shape in {**THEIRS, **shapes}.items()}
    if name: state[name] = torch.ones(1)
    with pytest.raises(ValueError) as e:
        released.from_moe_adapters4cl(state, vision_heads=heads, text_heads=heads)
    assert type(e.value) is ValueError
    assert any(word in str(e.value) for word in REASONS)

@given(st.sampled_from(['x.pt', 'x.pth', 'x.safetensors', 'x']), damage())
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path_factory, name, change):
    d = tmp_path_factory.getbasetemp()
    state = {'visual.proj': torch.ones(3, 3)}
    if name.endswith('safetensors'): save_file(state, d/name)
    else: torch.save(state, d/name)
    (d/name).write_bytes(change((d/name).read_bytes()))
    found = read_or_refused(lambda: released.read_checkpoint(d/name), name)
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
    path.write_bytes(flip(path.read_bytes(), where, bit))

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
    path.write_bytes(shared.checked.read_bytes())
    flipped(path, where, bit)
    refused(lambda: shared.load(path), 'flip.safetensors', path.parent)


# ---- settings

def is_whole(value, least):
    return type(value) is int and value >= least

def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)

MERGE = dict(
    every=10,
    until=.75,
    window='task',
    n_sources=2,
    frozen_sources=True,
    protect=False,
    combine='mean',
    align=False,
    router='keep',
    reset_optimizer=True,
)

@given(st.sampled_from(sorted(MERGE)), odd)
@example('align', 'no')
@example('combine', 'os.path')
def test_a_merge_rule_is_of_its_kind_or_refused_by_name(name, value):
    try: rule = Merge(**{**MERGE, name: value})
    except ValueError as e:
        assert f'merge.{name}' in str(e)
        return
    if name in ('every', 'n_sources'): assert value is None or is_whole(value, 1)
    if name in ('frozen_sources', 'protect', 'align', 'reset_optimizer'): assert type(value) is bool
    if name == 'until': assert 0 < value <= 1
    if name == 'combine': assert callable(rule.combine) or rule.combine in ('mean', 'usage_weighted') or '.' in value

TRAIN = dict(
    iterations=50,
    batch=8,
    lr=1e-3,
    warmup=5,
    label_smoothing=.2,
    weight_decay=0.,
    betas=(.9, .999),
    workers=0,
    micro_batch=None,
    precision='fp32',
)

def are_rates(value):
    "A learning rate, or one a group."
    rates = value.values() if isinstance(value, dict) else [value]
    return all(is_number(v) and v > 0 for v in rates)

@given(st.sampled_from(sorted(TRAIN)), odd)
@example('lr', math.nan)
@example('iterations', 'a')
@example('batch', 1.5)
@example('betas', (2, 3))
def test_settings_of_training_are_of_their_kind_or_refused_by_name(name, value):
    try: Train(**{**TRAIN, name: value})
    except ValueError as e:
        also = 'train.warmup' if name == 'iterations' else f'train.{name}'
        assert f'train.{name}' in str(e) or also in str(e)
        return
    if name in ('iterations', 'batch'): assert is_whole(value, 1)
    if name == 'micro_batch': assert value is None or is_whole(value, 1)
    if name in ('warmup', 'workers'): assert is_whole(value, 0)
    if name in ('label_smoothing', 'weight_decay'): assert is_number(value) and value >= 0
    if name == 'lr': assert are_rates(value)
    if name == 'betas': assert len(value) == 2 and all(0 <= b < 1 for b in value)

EXPERTS = dict(
    n_experts=4,
    rank=2,
    top_k=2,
    scale=.1,
    dropout=.1,
    shared_init=False,
    gate='top_k',
    top_p=.4,
)

@given(st.sampled_from(sorted(EXPERTS)), odd)
@example('scale', math.nan)
@example('scale', 'abc')
@example('shared_init', 'no')
@example('n_experts', True)
def test_settings_of_experts_are_of_their_kind_or_refused_by_name(name, value):
    try: Experts(**{**EXPERTS, name: value})
    except ValueError as e:
        assert name in str(e)
        return
    if name == 'n_experts': assert is_whole(value, 0)
    if name in ('rank', 'top_k'): assert is_whole(value, 1)
    if name in ('scale', 'dropout', 'top_p'): assert is_number(value)
    if name == 'shared_init': assert type(value) is bool
    if name == 'gate': assert value in GATES

REFUSED = [
    'train.iterations=1e400',
    'train.lr=nan',
    'train.lr=[1,2]',
    'train.betas=5',
    'experts.scale=abc',
    'experts.gate=[1]',
    'experts.shared_init=maybe',
    'train=5',
    'merge=5',
    'freeze=5',
    'freeze.n=-1',
    'merge.every=abc',
    'merge.align=maybe',
    'experts.rank=1.5',
    'selectors=5',
    'selectors=abc',
    'predict=[a]',
    'seed=abc',
    'seed=1.5',
    'seed=-5',
    'seed=99999999999999999999',
    'seed=nan',
    'threads=0',
    'train.nope=3',
    'nope=1',
    'stream=nope',
    'method=nope',
    'stream.n_classes=99',
    'device=nope',
]

@pytest.mark.parametrize('override', REFUSED)
def test_an_odd_setting_on_the_command_line_is_refused_and_named(monkeypatch, override):
    def trains(*args): raise AssertionError('it would have been trained')
    monkeypatch.setattr(job, 'run', trains)
    with pytest.raises((job.UsageError, HydraException)) as e:
        job.job(composed('stream=toy', 'model=toy', override), progress=False)
    assert override.split('=')[0].split('.')[-1] in str(e.value)
