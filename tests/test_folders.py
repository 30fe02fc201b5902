"""Names and entries of folders: what is a task, a class, an image, and how it is called."""
import os
import unicodedata
import warnings
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.job import job
from moe_merge_nb.streams.datasets import MTIL, find, mtil
from moe_merge_nb.streams.entries import LEFT_BEHIND, left_behind
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.miniature import miniature
from moe_merge_nb.streams.prepare import damaged, status
from moe_merge_nb.streams.sources import templates_of
from moe_merge_nb.streams.tasks import Stream, Task, toy_stream

def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype='uint8')).save(path)

def tree(root, tasks=('A', 'B'), classes=('cat', 'dog'), n=2):
    "`root`/TASK/train|test/CLASS/0.png ..."
    every = [root/t/s/c for t in tasks for s in ('train', 'test') for c in classes]
    for k, d in enumerate(every):
        for i in range(n): image(d/f'{i}.png', 10*k + i)
    return root

@pytest.fixture
def read(tmp_path):
    "A folder as a stream, without one warning."
    def stream(root, *args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            return folder(root, *args, size=8, cache=tmp_path/'cache', **options)
    return stream

def classes_of(stream): return [t.classes for t in stream]
def files_of(stream): return sorted(Path(f).name for t in stream for f in (*t.train.paths, *t.test.paths))

# ---- names that look like numbers

def test_tasks_may_be_named_by_year(tmp_path, read):
    root = tree(tmp_path/'root', tasks=('2019', '2020'))
    s = read(root, [2020, 2019])
    assert s.names == ['2020', '2019'] == s.info['order']
    assert read(root, ['2020', '2019']).info == s.info
    with pytest.raises(ValueError, match=r"order is \[2020, 2021\].*\['2019', '2020'\]"): read(root, [2020, 2021])
    with pytest.raises(ValueError, match='order is 2020'): read(root, 2020)

def test_and_so_from_the_command_line(tmp_path):
    root = tree(tmp_path/'root', tasks=('2019', '2020'))
    said = ['stream=folder', f'root={root}', 'stream.order=[2020,2019]', 'stream.size=32', 'model=toy']
    said += ['method=zero_shot', f'stream.cache={tmp_path}/cache']
    assert job(composed(*said), progress=False).config['tasks'] == ['2020', '2019']

# ---- one name, one spelling

NFC, NFD = 'caf\u00e9', unicodedata.normalize('NFD', 'caf\u00e9')

def renamed(root, old, new):
    for d in sorted(root.rglob(old), reverse=True): d.rename(d.with_name(new))
    return root

def test_the_two_spellings_of_unicode_are_one_name(tmp_path, read):
    one = tree(tmp_path/'one', tasks=(NFC,), classes=(NFC, 'cafz'))
    other = renamed(tree(tmp_path/'other', tasks=(NFC,), classes=(NFC, 'cafz')), NFC, NFD)
    a, b = read(one), read(other)
    assert a.names == b.names == [NFC] and classes_of(a) == classes_of(b) == [('cafz', NFC)]
    assert a[0].train.labels.tolist() == b[0].train.labels.tolist()
    assert a.info == b.info
    assert [Path(f).read_bytes() for f in a[0].train.paths] == [Path(f).read_bytes() for f in b[0].train.paths]
    assert read(other, [NFC]).names == read(one, [NFD]).names == [NFC]

def test_train_and_test_may_have_different_spellings_and_texts_too(tmp_path, read):
    root = tree(tmp_path/'root', tasks=('A',), classes=(NFC, 'dog'))
    (root/'A'/'test'/NFC).rename(root/'A'/'test'/NFD)
    (root/'A'/'classes.txt').write_text(f'{NFD}: {NFD} bar\n', encoding='utf-8')
    assert classes_of(read(root)) == [(f'{NFC} bar', 'dog')]

@pytest.mark.parametrize('where', ['task', 'class'])
def test_two_folders_with_one_name_are_refused(tmp_path, read, where):
    names = dict(tasks=(NFC, NFD)) if where == 'task' else dict(classes=(NFC, NFD))
    with pytest.raises(ValueError, match=r"two entries called 'café', spelled 'cafe\\u0301' and 'caf\\xe9'"):
        read(tree(tmp_path/'root', **names))

# ---- links

def test_a_link_to_a_folder_above_brings_nothing_in(tmp_path, read):
    root = tree(tmp_path/'root')
    before = [list(t.train.paths) for t in read(root)]
    (root/'A'/'train'/'cat'/'up').symlink_to('..')
    (root/'A'/'train'/'cat'/'root').symlink_to('/')
    (root/'A'/'test'/'dog'/'self').symlink_to('.')
    assert [list(t.train.paths) for t in read(root)] == before

@pytest.mark.parametrize('target', [
    '../dog', # another class
    '../dog/deep', # in another class
    '../../test/cat', # the same one's test images
    '../../../B/train', # all classes of another task
    '../../../B',
])
def test_a_link_into_another_class_is_refused(tmp_path, read, target):
    root = tree(tmp_path/'root')
    image(root/'A'/'train'/'dog'/'deep'/'x.png')
    (root/'A'/'train'/'cat'/'more').symlink_to(target)
    with pytest.raises(ValueError, match='a link leads from one class into another: .*/A/train/cat/more'): read(root)

def test_a_class_folder_that_is_a_link_to_another_class_is_refused(tmp_path, read):
    root = tree(tmp_path/'root')
    (root/'A'/'train'/'kitty').symlink_to('cat')
    with pytest.raises(ValueError, match='one class into another'): read(root)

def test_links_to_images_elsewhere_are_followed_and_tasks_may_share_a_class(tmp_path, read):
    root = tree(tmp_path/'root')
    image(tmp_path/'elsewhere'/'deep'/'far.png')
    (root/'A'/'train'/'cat'/'more').symlink_to(tmp_path/'elsewhere')
    (root/'B'/'train'/'extra').symlink_to(root/'A'/'test'/'dog')
    s = read(root)
    assert files_of(s).count('far.png') == 1 and s[1].classes == ('cat', 'dog', 'extra')

# ---- what is left behind

LEFT = ['.DS_Store', 'Thumbs.db', 'desktop.ini', '._image_0001.jpg', '._sun_x.jpg']
DIRECTORIES = ['@eaDir', '.ipynb_checkpoints', '__MACOSX']

def litter(directory):
    "What a Mac, Windows, a network drive and Jupyter leave in a folder."
    for name in LEFT: (directory/name).write_bytes(b'\0')
    for name in DIRECTORIES:
        for file in ('image_0001.jpg', 'sun_a.jpg'): image(directory/name/file)

def litter_everywhere(root):
    for d in [root, *(d for d in sorted(root.rglob('*')) if d.is_dir())]: litter(d)

def test_what_is_meant_is_decided_by_the_name():
    assert all(map(left_behind, [*LEFT, *DIRECTORIES, *LEFT_BEHIND, 'THUMBS.DB']))
    assert not any(map(left_behind, ['cat', 'image_0001.jpg', 'macosx', '@home', 'x.ini']))

def test_a_folder_of_ones_own_is_read_as_without_it(tmp_path, read):
    root = tree(tmp_path/'root')
    clean = read(root)
    litter_everywhere(root)
    s = read(root)
    assert (s.names, classes_of(s), s.info) == (clean.names, classes_of(clean), clean.info)
    assert files_of(s) == files_of(clean)

def test_so_are_all_datasets_of_the_benchmark(tmp_path):
    root = miniature(tmp_path/'root')
    def seen(part): return [part.dataset[i][1] for i in part.indices]
    clean = {name: find(name, root, check=False) for name in MTIL}
    before = {name: (f.classes, seen(f.train), seen(f.test)) for name, f in clean.items()}
    litter_everywhere(root)
    found = {name: find(name, root, check=False) for name in MTIL}
    assert {name: f.problems for name, f in found.items() if f.problems} == {}
    assert {name: (f.classes, seen(f.train), seen(f.test)) for name, f in found.items()} == before
    assert set(status(found, checked=False).verdict) == {'readable, not checked'}
    assert {name: damaged(f) for name, f in found.items() if damaged(f)} == {}
    assert len(mtil(root, size=8, check=False)) == len(MTIL)

def test_an_image_that_is_not_there_is_no_image(tmp_path):
    root = miniature(tmp_path/'root')
    crab = Path(root)/'caltech101'/'101_ObjectCategories'
    [*_, folder_of_one] = sorted(d for d in crab.iterdir() if d.name != 'BACKGROUND_Google')
    before = len(find('Caltech101', root, check=False).train.dataset)
    (folder_of_one/'image_0002.jpg').unlink()
    (folder_of_one/'Thumbs.db').write_bytes(b'\0')
    found = find('Caltech101', root, check=False)
    assert found.problems == () and len(found.train.dataset) == before - 1

# ---- files that are none, and a name that is taken

@pytest.mark.parametrize('name', ['templates.txt', 'classes.txt'])
@pytest.mark.parametrize('kind', ['pipe', 'device', 'long'])
def test_text_files_that_never_end_are_refused(tmp_path, read, name, kind):
    root = tree(tmp_path/'root')
    if kind == 'pipe': os.mkfifo(root/'A'/name)
    elif kind == 'device': (root/'A'/name).symlink_to('/dev/zero')
    else: (root/'A'/name).write_bytes(b'a {}\n' * 1_000_000)
    with pytest.raises(ValueError, match=f'A/{name}.*(no regular file|more than 1,000,000 bytes)'): read(root)

def test_no_task_is_called_as_the_results_call_the_model(tmp_path, read):
    with pytest.raises(ValueError, match="'CLIP' is what results call the model before any task; rename it"):
        read(tree(tmp_path/'root', tasks=('A', 'CLIP')))
    t = toy_stream(1)[0]
    assert Stream('s', [Task('clip', t.classes, t.templates, train=t.train, test=t.test)]).names == ['clip']
    assert templates_of('DTD')[0].count('{}') == 1
