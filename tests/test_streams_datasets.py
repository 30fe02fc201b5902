import json, os, pickle, shutil, tempfile
from functools import cache
from pathlib import Path
import pytest, torch
from torchvision import datasets as tv
from moe_merge_nb.streams.datasets import ORDERS, files, find, labels, load, mtil
from moe_merge_nb.streams.miniature import miniature
from moe_merge_nb.streams.sources import MTIL, names_of, templates_of

@cache
def tree(): return miniature(tempfile.mkdtemp(), classes=3, per_class=4)


def test_the_80_20_split_is_torchs_with_seed_42():
    for name in ('Caltech101', 'EuroSAT', 'SUN397'):
        train, test = load(name, tree(), check=False)
        n = len(train.dataset)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).tolist()
        assert list(train.indices) == order[:int(.8*n)] and list(test.indices) == order[int(.8*n):]
        assert train.dataset is test.dataset
    sun = train.dataset
    folders = [Path(f).relative_to(tree()/'SUN397').parts[1:-1] for f in files(sun)]
    assert files(sun) == sorted(files(sun)) and labels(sun) == [sun.class_to_idx['/'.join(f)] for f in folders]


def test_labels_without_decoding_are_the_labels():
    for name in MTIL:
        for part in load(name, tree(), check=False):
            assert labels(part.dataset) == [int(part.dataset[i][1]) for i in range(len(part.dataset))], name
            paths = files(part.dataset)
            assert (paths is None) == (name in ('CIFAR100', 'MNIST')) and all(os.path.exists(p) for p in paths or [])


def test_real_checksums_stay_in_force():
    for name in ('CIFAR100', 'Flowers'):
        with pytest.raises(RuntimeError, match='not found or corrupted'): load(name, tree(), check=True)
        assert len(load(name, tree(), check=False)[0])
    assert tv.CIFAR100.train_list[0][1] and tv.CIFAR100.meta['md5'] and tv.Flowers102._file_dict['label'][1]


def test_a_tree_is_found_and_its_faults_are_named():
    assert not any(find(name, tree(), check=False).problems for name in MTIL)
    small = {name: find(name, tree()).problems for name in MTIL}
    assert all(small.values())
    assert '12 training images, should be 3,334' in small['Aircraft'] and '3 classes, should be 47' in small['DTD']
    assert 'checksums' in small['CIFAR100'][0]
    with tempfile.TemporaryDirectory() as empty:
        for name, s in MTIL.items():
            problem, = find(name, empty).problems
            assert problem.startswith('missing: ') and all(f in problem for f in s.files.split())
        assert not os.listdir(empty) # looking leaves no folders behind


def test_damage_is_named_before_training():
    with tempfile.TemporaryDirectory() as d:
        root = miniature(d, classes=2, per_class=2)
        def problems(name): return find(name, root, check=False).problems
        image = next((root/'food-101/images').rglob('*.jpg'))
        image.unlink()
        assert problems('Food') == (f'1 images are listed but not there, the first is {image}',)
        (root/'stanford_cars/devkit/cars_meta.mat').write_bytes(b'')
        assert 'StanfordCars cannot read it' in problems('StanfordCars')[0]
        (root/'dtd/dtd/labels/test1.txt').write_text('')
        assert '0 test images' in problems('DTD')[0]
        shutil.move(root/'caltech101/101_ObjectCategories/BACKGROUND_Google', root/'elsewhere')
        assert 'BACKGROUND_Google' in problems('Caltech101')[0]


def test_the_eleven_tasks_are_loaded_by_torchvision():
    stream = mtil(tree(), size=32, check=False)
    assert stream.name == 'mtil' and stream.names == list(MTIL)
    for task in stream:
        source, train = MTIL[task.name], task.train.dataset
        reported = list(getattr(train, 'categories', None) or train.classes)
        assert isinstance(train, source.dataset) and isinstance(task.test.dataset, source.dataset)
        assert list(task.classes) == [names_of(task.name)[c] for c in reported] # torchvision's order
        assert task.templates == templates_of(task.name)
        assert len(task.train) == len(task.calibration) > 0 < len(task.test)
        assert not set(task.train.positions) & set(task.test.positions) or source.test is not None
    copied = pickle.loads(pickle.dumps(stream)) # workers may be spawned
    assert torch.equal(copied[2].test[1][0], stream[2].test[1][0])


def test_order_two_has_the_same_tasks():
    assert mtil(tree(), order=2, check=False).names == list(ORDERS[2])
    assert sorted(ORDERS[2]) == sorted(MTIL)


def test_images_are_tensors_and_only_training_images_are_augmented():
    for task in mtil(tree(), size=32, check=False):
        train, calibration = task.train, task.calibration
        for part in (train, calibration, task.test):
            x, y = part[len(part) - 1]
            assert x.shape == (3, 32, 32) and x.dtype == torch.float32
            assert type(y) is int and 0 <= y < len(task.classes)
        assert [y for _, y in train] == [y for _, y in calibration]
        seen = calibration[0][0]
        assert torch.equal(seen, calibration[0][0])
        assert any(not torch.equal(train[0][0], seen) for _ in range(20))


def test_labels_follow_torchvisions_own_rule():
    stream = {t.name: t for t in mtil(tree(), size=32, check=False)}
    def named(task, part):
        "File and class of each image"
        y, paths = labels(part.dataset), files(part.dataset)
        return [(Path(paths[i]), task.classes[y[i]]) for i in part.positions]
    for name in ('Caltech101', 'DTD', 'EuroSAT', 'Food'): # where the folder is the class
        task = stream[name]
        for p, c in named(task, task.train) + named(task, task.test): assert c == names_of(name)[p.parent.name]
    sun, pets = stream['SUN397'], stream['OxfordPet']
    for p, c in named(sun, sun.test):
        assert c == names_of('SUN397')['/'.join(p.relative_to(tree()/'SUN397').parts[1:-1])]
    assert any('/' in c for c in sun.train.dataset.classes) # nested names are among them
    for p, c in named(pets, pets.test): assert c.replace(' ', '_').lower() == p.name.rsplit('_', 1)[0].lower()
    digits = stream['MNIST']
    assert set(labels(digits.train.dataset)) <= set(range(10)) and digits.classes == tuple('0123456789')


def test_one_error_lists_everything_that_is_missing_or_wrong():
    def refused(pattern, *args, **options):
        with pytest.raises(ValueError, match=pattern) as e: mtil(*args, **options)
        return str(e.value)
    with tempfile.TemporaryDirectory() as d:
        text = refused('11 of 11 datasets', d)
        assert all(f'* {n}: missing: ' in text for n in MTIL)
        assert 'kaggle.com' in text and 'moe-merge-data prepare' in text
        root = miniature(d, classes=2, per_class=2)
        for gone in ('SUN397', 'MNIST'): shutil.rmtree(root/gone)
        text = refused('2 of 11 datasets', root, check=False)
        assert '* SUN397: missing: SUN397/ClassName.txt' in text and '* MNIST: missing' in text
        assert mtil(root, check=False, tasks=['DTD', 'Aircraft']).names == ['Aircraft', 'DTD']
        assert '4 training images, should be 1,880' in refused('1 of 1 datasets', root, tasks=['DTD'])
    refused('order is 3', tree(), order=3)
    refused('shots is 0', tree(), shots=0)
    refused('Cars', tree(), tasks=['Cars'])
    refused('tasks is', tree(), tasks=[])
    refused("names is 'x'", tree(), names='x', check=False)


def test_few_shot_lists_are_saved_and_used_again():
    def few(root, seed=3, **options): return mtil(root, shots=2, data_seed=seed, check=False, size=32, **options)
    with tempfile.TemporaryDirectory() as d, tempfile.TemporaryDirectory() as elsewhere:
        root = miniature(d, classes=2, per_class=6)
        one, two, other = few(root), few(root), few(root, seed=4, lists=elsewhere)
        for a, b in zip(one, two):
            present, y = set(labels(a.test.dataset)), labels(a.train.dataset)
            assert a.train.positions == a.calibration.positions == b.train.positions
            assert sorted(y[i] for i in a.train.positions) == sorted(2*list(present))
            assert len(a.test) == len(b.test)
        assert any(a.train.positions != b.train.positions for a, b in zip(one, other))
        lists = sorted(p.name for p in (root/'few-shot/2-shot-seed3').iterdir())
        assert lists == sorted(f'{n}.json' for n in MTIL)
        assert len(os.listdir(Path(elsewhere)/'few-shot/2-shot-seed4')) == 11
        saved = json.loads((root/'few-shot/2-shot-seed3/DTD.json').read_text())
        assert saved['names'][0].startswith('dtd/dtd/images/')
        moved = Path(elsewhere)/'moved'
        shutil.copytree(root, moved)
        assert [t.train.positions for t in few(moved)] == [t.train.positions for t in one]
        with pytest.raises(ValueError, match="task 'Aircraft'.*fewer"): mtil(root, shots=99, check=False)


def test_a_damaged_image_is_named():
    with tempfile.TemporaryDirectory() as d:
        root = miniature(d, classes=2, per_class=2)
        task = mtil(root, check=False, tasks=['DTD', 'Caltech101'], size=32)
        for t in task:
            path = Path(files(t.test.dataset)[t.test.positions[0]])
            path.write_bytes(path.read_bytes()[:200])
            with pytest.raises(ValueError, match=path.name): t.test[0]
