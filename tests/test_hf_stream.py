"""Datasets of the Hugging Face library as a stream: columns, splits and classes found by their types; no network."""
import os
import sys
import pytest
import torch
from torchvision.transforms.functional import to_pil_image
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run.config import given
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import stream_of
from moe_merge_nb.streams.hf import hf
from moe_merge_nb.streams.identity import identity
from moe_merge_nb.streams.tasks import toy_stream

def test_without_the_library_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match=r"stream=hf needs datasets .*: pip install 'moe_merge_nb\[hf\]'"): hf(['x'])

def test_a_list_of_datasets_is_asked_for():
    for wrong in ((), 'cifar10'):
        with pytest.raises(ValueError, match='stream.datasets is .*give a list of names'): hf(wrong)
    with pytest.raises(ValueError, match="stream.labels names 'b', which is none of .'a'"): hf(['a'], {'b': 'fine'})
    assert given('hf') == {'data_seed': ('data_seed', 0), 'shots': ('shots', None), 'size': ('image_size', None)}

TOY = toy_stream(2, n_train=12, n_test=6)

@pytest.fixture(scope='module')
def d():
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    return pytest.importorskip('datasets')

def table(d, images, label='label', names=('red_one', 'green', 'blue'), **more):
    "A dataset of the library, one row per image; `more` are further columns: their type, their values."
    rows = {'picture': [to_pil_image(im) for im in images.images], label: images.labels.tolist()}
    types = {'picture': d.Image(), label: d.ClassLabel(names=list(names))}
    rows |= {k: v for k, (_, v) in more.items()}
    return d.Dataset.from_dict(rows, d.Features(types | {k: t for k, (t, _) in more.items()}))

@pytest.fixture(scope='module')
def places(d, tmp_path_factory):
    "Two datasets on disk."
    root = tmp_path_factory.mktemp('hf')
    for task in TOY:
        d.DatasetDict(train=table(d, task.train), test=table(d, task.test)).save_to_disk(str(root/task.name))
    return [str(root/task.name) for task in TOY]

def test_images_labels_and_classes_are_those_of_the_dataset(places):
    stream = hf(places, size=32)
    assert stream.name == 'hf' and stream.names == ['squares', 'circles']
    for task, toy in zip(stream, TOY):
        assert task.classes == ('red one', 'green', 'blue') and task.templates == ('a photo of a {}.',)
        assert (len(task.train), len(task.test), len(task.calibration)) == (12, 6, 12)
        for ours, theirs in ((task.calibration, toy.train), (task.test, toy.test)):
            assert ours.labels.tolist() == theirs.labels.tolist()
            assert torch.stack([x for x, _ in ours]).sub(torch.stack([x for x, _ in theirs])).abs().max() < 1e-5

def test_few_shots_are_drawn_by_the_data_seed(places):
    few, other = (hf(places, shots=2, data_seed=s, size=32)[0].train for s in (0, 1))
    assert few.labels.bincount().tolist() == [2, 2, 2] and few.positions != other.positions
    assert few.positions == hf(places, shots=2, size=32)[0].train.positions
    with pytest.raises(ValueError, match="shots is 99, but class 'red one' has 4"): hf(places, shots=99, size=32)

def test_a_stream_is_known_by_what_is_in_it(d, places, tmp_path):
    same = identity(hf(places, size=32))
    assert same == identity(hf(places, size=32)) and len(set(same.values())) == 2
    moved = table(d, TOY[0].train)
    d.DatasetDict(train=moved, test=table(d, TOY[0].test)).save_to_disk(str(tmp_path/'squares'))
    assert identity(hf([tmp_path/'squares'], size=32))['squares'] == same['squares']       # content, not place
    changed = moved.map(lambda row: {'label': (row['label'] + 1) % 3})
    d.DatasetDict(train=changed, test=table(d, TOY[0].test)).save_to_disk(str(tmp_path/'changed'/'squares'))
    assert identity(hf([tmp_path/'changed'/'squares'], size=32))['squares'] != same['squares']

def saved(tmp_path, d, **splits):
    "A directory with these splits."
    d.DatasetDict(**splits).save_to_disk(str(tmp_path/'odd'))
    return str(tmp_path/'odd')

def test_of_several_label_columns_one_is_named(d, tmp_path):
    coarse = (d.ClassLabel(names=['warm', 'cold']), [0, 1]*6)
    train, test = (table(d, TOY[0].train, coarse=coarse) for _ in range(2))
    odd = saved(tmp_path, d, train=train, test=test)
    with pytest.raises(ValueError, match=r"has the ClassLabel columns \['label', 'coarse'\]"): hf([odd], size=32)
    assert hf([odd], labels={odd: 'coarse'}, size=32)[0].classes == ('warm', 'cold')
    with pytest.raises(ValueError, match='ClassLabel columns'): hf([odd], labels={odd: 'fine'}, size=32)

def test_what_a_stream_needs_and_a_dataset_lacks_is_named(d, tmp_path):
    train, test = (table(d, TOY[0].train).remove_columns('picture') for _ in range(2))
    with pytest.raises(ValueError, match=r"has the Image columns \[\], of \['label'\]"):
        hf([saved(tmp_path/'1', d, train=train, test=test)], size=32)
    whole = table(d, TOY[0].train)
    with pytest.raises(ValueError, match=r"has the splits \['test'\]: one must be train"):
        hf([saved(tmp_path/'2', d, test=whole)], size=32)
    hidden = whole.map(lambda row: {'label': -1})
    with pytest.raises(ValueError, match="one of .'test', 'validation'.* must be there, with labels"):
        hf([saved(tmp_path/'3', d, train=whole, test=hidden)], size=32)
    judged = hf([saved(tmp_path/'4', d, train=whole, test=hidden, validation=table(d, TOY[0].test))], size=32)
    assert len(judged[0].test) == 6
    other = saved(tmp_path/'5', d, train=whole, test=table(d, TOY[0].test, names=('green', 'red_one', 'blue')))
    says = "the classes of label differ between the splits .'red_one', 'green'"
    with pytest.raises(ValueError, match=says): hf([other], size=32)
    whole.save_to_disk(str(tmp_path/'one'))
    with pytest.raises(ValueError, match='is one split: save a DatasetDict'): hf([tmp_path/'one'], size=32)
    with pytest.raises(ValueError, match="'/no/such/place' cannot be loaded"): hf(['/no/such/place'], size=32)

def test_an_image_that_cannot_be_read_is_named_by_its_row(d, tmp_path):
    rows = dict(picture=[dict(bytes=b'no image', path=None)], label=[0])
    bad = d.Dataset.from_dict(rows, d.Features(picture=d.Image(), label=d.ClassLabel(names=['a', 'b', 'c'])))
    task = hf([saved(tmp_path, d, train=bad, test=table(d, TOY[0].test, names='abc'))], size=32)[0]
    with pytest.raises(ValueError, match='image 0 of the dataset cannot be read'): task.train[0]

def test_a_run_from_the_command_line_can_be_reproduced(places, tmp_path):
    small = 'model=toy method=moe experts.n_experts=4 experts.rank=2 selectors=[oracle]'.split()
    small += 'train.iterations=2 train.batch=4 train.warmup=1'.split()
    cfg = composed('stream=hf', f'stream.datasets=[{",".join(places)}]', 'shots=2', *small)
    job(cfg, str(tmp_path/'run'), False)
    config = load_result(tmp_path/'run').config
    assert config['stream'] == 'hf' and config['datasets'] == places and config['tasks'] == ['squares', 'circles']
    assert identity(stream_of(config)) == config['data_sha256']
    with pytest.raises(UsageError, match='stream.datasets is'):
        job(composed('stream=hf', *small), str(tmp_path/'x'), False)
