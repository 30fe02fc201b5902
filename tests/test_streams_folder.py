import json, os, shutil, tempfile, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.tasks import stack

def tree(root, tasks=('birds', 'cars'), classes=('a_b', 'c'), n=3, size=(40, 36)):
    "A small stream on disk: images that differ, under `root`/<task>/train|test/<class>/"
    root, rng = Path(root), np.random.default_rng(0)
    for d in [root/t/s/c for t in tasks for s in ('train', 'test') for c in classes]:
        d.mkdir(parents=True)
        for i in range(n):
            noise = rng.integers(0, 256, (*size[::-1], 3), dtype='uint8')
            Image.fromarray(noise).save(d/f'{i}.png')
    return root


def test_files_and_labels_are_those_of_imagefolder():
    from torchvision.datasets import ImageFolder
    from moe_merge_nb.streams.folder import _split
    with tempfile.TemporaryDirectory() as d:
        root = tree(d, classes=('b', 'B', 'a c', 'ü'))
        b = root/'birds'/'train'/'b'
        deep, hidden = b/'2024'/'may', b/'.x.png'
        deep.mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(deep/'x.jpg')
        (deep/'round').symlink_to(b) # a circle, which ImageFolder follows until the system stops it
        for odd in (hidden, b/'Thumbs.db'): odd.write_bytes(b'')
        found, stray = _split(root/'birds', 'train')
        assert str(deep/'x.jpg') in found['b'] and len(found['b']) == 4 and not stray
        for odd in (deep/'round', hidden): odd.unlink()
        theirs = ImageFolder(root/'birds'/'train')
        assert list(found) == theirs.classes == ['B', 'a c', 'b', 'ü']
        assert [(f, i) for i, c in enumerate(found) for f in found[c]] == theirs.samples
        task = folder(root, size=8, cache=Path(d)/'cache')[0]
        assert task.train.labels.tolist() == theirs.targets


def test_a_file_that_changes_or_vanishes_is_named():
    from torch.utils.data import DataLoader
    with tempfile.TemporaryDirectory() as d:
        task = folder(tree(Path(d)/'root'), size=8, cache=Path(d)/'cache')[0]
        path = Path(task.train.paths[4])
        path.write_bytes(path.read_bytes()[:50])
        for data in (task.train, task.calibration):
            data[3]
            with pytest.raises(ValueError, match='changed') as e: data[4]
            assert str(path) in str(e.value)
        path.unlink()
        for workers in (0, 1): # the name survives the way out of a worker process
            with pytest.raises(ValueError, match=f'{path} has vanished'):
                list(DataLoader(task.train, 2, num_workers=workers))
        path.mkdir()
        with pytest.raises(ValueError, match=str(path)): task.train[4]


def test_a_stream_of_files_is_a_stream_like_any_other():
    with tempfile.TemporaryDirectory() as d:
        cache, classes = Path(d)/'cache', ('x_y', 'c', 'only_train')
        root = tree(Path(d)/'root', tasks=('b_b', 'a', '.hidden', '__MACOSX'), classes=classes)
        for t in ('a', 'b_b'):
            shutil.rmtree(root/t/'test'/'only_train')
            (root/t/'val').mkdir()
        (root/'templates.txt').write_text('\ufeffa photo of a {}.\n\n  a sketch of a {}. \n', encoding='utf-8')
        (root/'b_b'/'templates.txt').write_text('satellite: {}\n')
        (root/'a'/'classes.txt').write_text('x_y : a: b\n')
        def read(*args, **options): return folder(root, *args, size=16, cache=cache, **options)
        with warnings.catch_warnings(action='error'): s = read()
        assert s.names == ['a', 'b_b'] and read(['b_b', 'a']).names == ['b_b', 'a']
        a, b = s
        assert a.classes == ('c', 'only train', 'a: b') and b.classes == ('c', 'only train', 'x y')
        assert a.templates == ('a photo of a {}.', 'a sketch of a {}.') and b.templates == ('satellite: {}',)
        assert a.train.labels.tolist() == [0]*3 + [1]*3 + [2]*3 and a.test.labels.tolist() == [0]*3 + [2]*3
        x, y = stack(a.test)
        assert x.shape == (6, 3, 16, 16) and torch.equal(y, a.test.labels) and torch.equal(x, stack(a.test)[0])
        assert a.calibration.paths == a.train.paths
        assert torch.equal(stack(a.calibration)[0], stack(a.calibration)[0])
        torch.manual_seed(0)
        assert not torch.equal(stack(a.train)[0], stack(a.train)[0]) # augmented
        one, same, other = (read(shots=2, data_seed=i)[0] for i in (0, 0, 1))
        assert one.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert one.train.paths == same.train.paths != other.train.paths
        assert one.calibration.paths == one.train.paths and len(one.test) == 6
        with pytest.raises(ValueError, match="shots is 4, but class 'c' has 3"): read(shots=4)
        kinds = {p.suffix for p in root.rglob('*') if p.is_file()}
        assert kinds <= {'.png', '.txt'} # nothing is written among the images


def test_the_fingerprint_follows_the_data():
    with tempfile.TemporaryDirectory() as d:
        root = tree(Path(d)/'root')
        def fingerprint(root, *order): return folder(root, *order, size=8, cache=Path(d)/'cache').info['fingerprint']
        one = fingerprint(root)
        root = root.rename(Path(d)/'moved')
        assert fingerprint(root, ['cars', 'birds']) == one
        (root/'templates.txt').write_text('{}')
        two = fingerprint(root)
        assert two != one
        (root/'birds'/'train'/'c'/'0.png').unlink()
        assert fingerprint(root) not in (one, two)


def test_odd_files_are_all_named_and_never_loaded():
    def spoil(c, png):
        "Write into the class folder `c` seven files that are bad, three that are odd but good, two that do not count"
        heic = b'\0\0\0\x18ftypheic' + bytes(99)
        odd = {'truncated.png': png[:len(png)//2], 'empty.jpg': b'', 'notes.txt': b'buy milk', 'photo.heic': heic}
        for name, content in odd.items(): (c/name).write_bytes(content)
        Image.new('L', (900, 1)).save(c/'line.png')
        (c/'nowhere.png').symlink_to(c/'gone')
        os.mkfifo(c/'pipe.png')
        Image.new('CMYK', (9, 9)).save(c/'fine1.jpg')
        Image.fromarray(np.zeros((9, 9), 'uint16')).save(c/'fine2.png')
        Image.new('P', (9, 9)).save(c/'fine3.gif', save_all=True, append_images=[Image.new('P', (9, 9), 1)])
        for name in ('Thumbs.db', '.DS_Store'): (c/name).write_bytes(b'x')
        return [*odd, 'line.png', 'nowhere.png', 'pipe.png']
    with tempfile.TemporaryDirectory() as d:
        root, cache = tree(Path(d)/'root'), Path(d)/'cache'
        png, bad = (root/'birds'/'train'/'c'/'0.png').read_bytes(), {'cars/train/lost.png'}
        for split in ('train', 'test'):
            bad |= {f'cars/{split}/c/{name}' for name in spoil(root/'cars'/split/'c', png)}
        (root/'cars'/'train'/'lost.png').write_bytes(png) # beside the class folders
        with pytest.warns(UserWarning) as said: s = folder(root, size=8, cache=cache)
        with pytest.raises(ValueError) as e: folder(root, size=8, on_bad='refuse', cache=cache)
        for text in (str(said[0].message), str(e.value)):
            first, *lines = text.splitlines()
            assert first.startswith('15 bad files') and {line.split(': ')[0].strip() for line in lines} == bad
        assert len(said) == 1 and s.info['skipped'] == 15
        assert len(stack(s[1].train)[0]) == len(stack(s[1].test)[0]) == 2*3 + 3
        for f in (root/'cars'/'test'/'c').glob('[0-9f]*'): f.unlink() # nothing good is left
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="task 'cars': no image in test/c is good"):
            folder(root, size=8, cache=cache)


def no_tasks(root):
    for p in root.iterdir(): shutil.rmtree(p)
def flat(root):
    train = root/'birds'/'train'
    shutil.rmtree(train)
    train.mkdir()
    Image.new('L', (5, 5)).save(train/'1.png')
def empty(root):
    for f in (root/'cars'/'test'/'a_b').iterdir(): f.unlink()
def extra(root): shutil.copytree(root/'birds'/'test'/'c', root/'birds'/'test'/'extra')
def twice(root):
    for s in ('train', 'test'): shutil.copytree(root/'birds'/s/'c', root/'birds'/s/'a b')

def test_folders_that_are_no_stream_are_refused():
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        def refused(pattern, change=lambda root: None, **options):
            shutil.rmtree(d/'root', ignore_errors=True)
            root = tree(d/'root')
            change(root)
            with pytest.raises(ValueError, match=pattern): folder(root, **(dict(size=8, cache=d/'cache') | options))
        refused('root.*no folder', shutil.rmtree)
        refused('has no task', no_tasks)
        for split in ('train', 'test'):
            def renamed(root): (root/'birds'/split).rename(root/'birds'/split.upper())
            refused(f"task 'birds' has no folder {split}/.*holds", renamed)
        refused('train has no class folders', flat)
        refused('test/a_b holds no images', empty)
        refused(r"'birds': test/ has the classes \['extra'\].*it has \['a_b', 'c'\]", extra)
        refused(r"\['a b'\]; class names must be unique", twice)
        for order in (['birds'], ['birds', 'cars', 'cars'], ['birds', 'boats'], 'birds', 1):
            refused(r"order is .*\['birds', 'cars'\]", order=order)
        refused("on_bad is 'ignore'", on_bad='ignore')
        refused('size is 0', size=0)
        refused('shots is 0', shots=0)


def test_text_files_that_cannot_be_meant_are_refused():
    wrong = [
        ('templates.txt', 'a photo\n', 'line 1.*0 gaps'),
        ('templates.txt', 'a {}.\n{} and {}\n', 'line 2.*2 gaps'),
        ('templates.txt', '\n', 'empty'),
        ('classes.txt', 'c\n', "line 1: 'c'; write"),
        ('classes.txt', 'c:\n', 'line 1'),
        ('classes.txt', '\nbat: a bat', "line 2: no class folder 'bat'")]
    with tempfile.TemporaryDirectory() as d:
        root, cache = tree(Path(d)/'root'), Path(d)/'cache'
        for name, text, reason in wrong:
            (root/'cars'/name).write_text(text)
            with pytest.raises(ValueError, match=f'{name}.*{reason}'): folder(root, size=8, cache=cache)
            (root/'cars'/name).unlink()
        (root/'templates.txt').write_bytes(b'\xff{}')
        with pytest.raises(ValueError, match='templates.txt is no UTF-8'): folder(root, size=8, cache=cache)


def test_a_run_from_files_end_to_end():
    from moe_merge_nb.clip.backbone import load_clip
    from moe_merge_nb.learn.method import Method
    from moe_merge_nb.learn.loop import run
    from moe_merge_nb.learn.settings import Train
    clip, train = load_clip('toy', 'random'), Train(iterations=2, batch=3, warmup=0)
    method = Method('m', experts=dict(n_experts=2, rank=2), train=train, selectors=('oracle', 'gaussian'))
    with tempfile.TemporaryDirectory() as d:
        root, cache, out = tree(Path(d)/'root', n=4), Path(d)/'cache', Path(d)/'out'
        (root/'cars'/'train'/'c'/'bad.png').write_bytes(b'')
        with pytest.warns(UserWarning, match='1 bad files'): s = folder(root, size=32, cache=cache)
        result = run(s, method, backbone=clip, directory=out, progress=False)
        assert len(result.matrix) == 2*2*2 and result.matrix.accuracy.between(0, 100).all()
        config = json.loads((out/'config.json').read_text())
        assert config['stream'] == 'folder' and config['tasks'] == ['birds', 'cars']
        assert config['skipped'] == 1 and config['fingerprint'] == s.info['fingerprint']
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            small = folder(root, size=16, cache=cache)
        with pytest.raises(ValueError, match='16 x 16, the model takes 32 x 32'):
            run(small, method, backbone=clip, progress=False)
