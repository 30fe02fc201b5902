"""A classifier says of the test images of a run what its accuracy matrix says, and reads images however they come."""
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_model
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.baselines.methods import TRAIN, method
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.results import accuracy_matrix
from moe_merge_nb.learn.views import averaged
from moe_merge_nb.run.classify import Classifier, load_classifier
from moe_merge_nb.run.describe import Words, words
from moe_merge_nb.streams.given import chunks, listed
from moe_merge_nb.streams.images import open_image, test_transform as as_tested
from moe_merge_nb.streams.tasks import Stream, toy_stream

SELECTORS = 'oracle', 'none', 'gaussian', 'autoencoder', 'text'

@pytest.fixture(scope='module')
def stream():
    "Two tasks that share a class name, so that among all tasks it is one class."
    squares, circles = toy_stream(2, n_train=60)
    return Stream('toy', (squares, replace(circles, classes=('red circle', 'green square', 'blue circle'))))

def learned(stream, directory, **how):
    "A classifier from a run directory, and the result of the run."
    train = replace(TRAIN, iterations=8, warmup=2, batch=8, lr=1e-2)
    how = dict(train=train, experts=Experts(n_experts=6, rank=4), classes=('task', 'all'), **how)
    ours = replace(method('moe_merge'), **how)
    result = run(stream, ours, seed=0, backbone=load_clip(), directory=directory, progress=False)
    return load_classifier(directory, device='cpu'), result

@pytest.fixture(scope='module')
def trained(stream, tmp_path_factory):
    "With every selector."
    return learned(stream, tmp_path_factory.mktemp('run'), selectors=SELECTORS)

@pytest.fixture(scope='module')
def c(stream):
    "A classifier of weights that say something, not trained."
    model, tokenizer = toy_model()
    return Classifier(model, tokenizer, [words(t) for t in stream])


# ---- the matrix

def accuracy(c, stream, i, **asked):
    "In %, of the test images of a task; names that are read alike are one class."
    found = c(stream[i].test, task=i, progress=False, **asked)
    right = [stream[i].classes[y] for y in stream[i].test.labels.tolist()]
    return 100*np.mean([a == b for a, b in zip(found['class'], right)])

@pytest.mark.parametrize('space', ['task', 'all'])
@pytest.mark.parametrize('selector', SELECTORS)
def test_its_accuracy_is_the_last_row_of_the_matrix(trained, stream, selector, space):
    c, result = trained
    row = accuracy_matrix(result, selector if space == 'task' else f'{selector} all')[-1]
    assert [accuracy(c, stream, i, selector=selector, classes=space) for i in range(2)] == row.tolist()

def test_a_run_with_another_strategy_is_classified_by_it(stream, tmp_path):
    c, result = learned(stream, tmp_path, selectors=('gaussian',), predict='averaged')
    row = accuracy_matrix(result, 'gaussian all')[-1]
    assert c.predict is averaged
    assert [accuracy(c, stream, i, selector='gaussian', classes='all') for i in range(2)] == row.tolist()

def test_the_selection_is_that_of_the_run_without_a_word_on_the_task(trained, stream):
    c, result = trained
    s = result.selection
    for task in stream:
        found = c(task.test, selector='gaussian', progress=False).task.value_counts().to_dict()
        said = s[(s.selector == 'gaussian') & (s.after == stream.names[-1]) & (s.task == task.name)]
        assert found == dict(zip(said.selected, said['count']))


# ---- what is told apart

def test_without_a_task_the_classes_are_those_of_the_chosen_one_and_of_all_for_plain_clip(c, stream):
    class ByTurns:
        def select(self, features, task=None): return torch.arange(len(features)) % 3 - 1
    found = c.answers(stream[0].test, selector=ByTurns(), details=True, progress=False)
    every = ('red square', 'green square', 'blue square', 'red circle', 'blue circle')
    assert found.classes[:3] == [every, stream[0].classes, stream[1].classes]
    assert found.table.task[:3].tolist() == ['CLIP', 'squares', 'circles']
    used = [[int((e[i] > 0).sum()) for e in found.experts] for i in range(2)]
    assert used == [4*[0], 4*[2]]
    x = torch.stack([stream[0].test[i][0] for i in range(3)])
    for i, s in enumerate((None, 0, 1)):
        torch.testing.assert_close(found.features[i], c.model.encode_image(x, s)[i], rtol=1e-4, atol=1e-5)

def test_words_of_ones_own_are_told_apart_with_templates_of_ones_own(c, stream):
    kinds = ['red thing', 'blue thing']
    found = c.answers(stream[0].test, task=0, classes=kinds, templates=['a {}', 'the {}.'], progress=False)
    x = torch.stack([x for x, _ in stream[0].test])
    texts = [t.format(k) for t in ('a {}', 'the {}.') for k in kinds]
    w = torch.nn.functional.normalize(c.model.encode_text(c.tokenizer(texts), 0), dim=-1).view(2, 2, -1).mean(0)
    z = torch.nn.functional.normalize(c.model.encode_image(x, 0), dim=-1)
    want = (c.model.logit_scale.exp()*z @ torch.nn.functional.normalize(w, dim=-1).T).detach()
    torch.testing.assert_close(torch.stack(found.logits), want, rtol=1e-3, atol=1e-3)
    p = want.softmax(1).max(1).values.numpy()
    assert found.table['class'].tolist() == [kinds[k] for k in want.argmax(1)]
    np.testing.assert_allclose(found.table.probability, p, atol=1e-4)

def test_the_table_has_the_next_classes_in_order(c, stream):
    table = c(stream[0].test.images[:4], classes='all', selector='CLIP', progress=False)
    assert list(table)[:6] == ['path', 'task', 'class', 'probability', 'class_2', 'probability_2']
    assert len(table.columns) == 12
    p = table.filter(like='probability').to_numpy()
    assert (np.diff(p, axis=1) <= 0).all() and np.allclose(p.sum(1), 1)
    few = c(stream[0].test.images[:1], task=0, progress=False)
    assert few.class_4.isna().all() and few.probability_4.isna().all() and few.class_3.notna().all()

def test_probabilities_of_a_strategy_that_gives_some_stay(c, stream):
    other = Classifier(c.model, c.tokenizer, c.tasks, predict=averaged)
    found = other.answers(stream[0].test, task=0, progress=False)
    np.testing.assert_allclose(found.table.probability, [float(x.max()) for x in found.logits])

def test_texts_are_encoded_once_per_task(stream):
    model, tokenizer = toy_model()
    c = Classifier(model, tokenizer, [words(t) for t in stream])
    for _ in range(3): c(stream[0].test.images[:2], task=0, progress=False)
    assert c.encoder.passes['prompts'] == 3*2 and c.encoder.passes['images'] == 6

def test_a_known_task_costs_one_pass(c, stream):
    before = c.encoder.passes['images']
    c(stream[1].test, task=1, classes='all', progress=False)
    assert c.encoder.passes['images'] - before == 24


# ---- what cannot be answered

@pytest.mark.parametrize('asked, said', [
    (dict(), 'no selector comes with this model.*say which task .squares, circles.'),
    (dict(task='rings'), "task is 'rings': choose one of squares, circles"),
    (dict(task=2), 'task is 2: choose one of'),
    (dict(selector='oracle'), 'the oracle must be told the task'),
    (dict(selector='gauss', task=0), "selector is 'gauss', but there are oracle, none, CLIP"),
    (dict(task=0, classes='cat'), "classes is 'cat': say 'task', 'all', or a list of words"),
    (dict(task=0, classes=[]), '0 classes; it needs at least 1'),
    (dict(task=0, classes=['cat', 'cat']), 'classes with the same name'),
    (dict(task=0, classes=['cat'], templates=['a photo']), 'has 0 gaps'),
    (dict(task=0, templates=['a {}']), 'templates are for words of your own'),
    (dict(task=0, top=0), 'top is 0: choose 1 class or more'),
    (dict(task=0, on_bad='hide'), "on_bad is 'hide'; choose 'skip' or 'refuse'"),
])
def test_what_cannot_be_asked_is_refused_with_the_remedy(c, stream, asked, said):
    with pytest.raises(ValueError, match=said): c(stream[0].test, progress=False, **asked)

def test_tasks_whose_classes_nobody_named_need_words(c, stream):
    model = Classifier(c.model, c.tokenizer, [Words('squares'), Words('circles')])
    with pytest.raises(ValueError, match='not known what the classes of squares are called'):
        model(stream[0].test, task=0, progress=False)
    assert len(model(stream[0].test, task=0, classes=['red', 'blue'], progress=False)) == 24

def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    Path('runs').mkdir()
    with pytest.raises(FileNotFoundError, match='runs/mine is not there'): load_classifier('runs/mine')
    for name in ('adapters.safetensors', 'no/adapters.safetensors'):
        with pytest.raises(FileNotFoundError, match=f'{name} is not there'): load_classifier(name)
    with pytest.raises(FileNotFoundError, match='user/repo is neither a run directory nor a shared file here'):
        load_classifier('user/repo')


# ---- images however they come

def pixels_of(images, size=32):
    "What the model is shown, and what was left out."
    found = list(chunks(listed(images), size))
    return torch.cat([f.images for f in found]), [p for f in found for p in f.paths], [p for f in found for p in f.bad]

def test_every_way_to_hold_a_picture_shows_the_same_pixels(tmp_path, stream):
    data, file = stream[0].test, tmp_path/'é x.png'
    Image.fromarray(data.images[0].permute(1, 2, 0).numpy()).save(file)
    array = data.images[0].permute(1, 2, 0).numpy()
    ways = [file, str(file), tmp_path, Image.open(file), array, data.images[0], data[0][0], data.images[:1], [array]]
    ways.append(np.array([str(file)]))
    for way in ways: assert torch.equal(pixels_of(way)[0][0], data[0][0]), way
    x, names, bad = pixels_of([*ways, iter([array])])
    assert len(x) == 11 and not bad and torch.equal(x, data[0][0].expand(11, -1, -1, -1))
    assert names[:4] == [str(file)]*4 and names[4] == 'image 4'
    assert torch.equal(pixels_of(data)[0], torch.stack([x for x, _ in data]))

def test_files_are_decoded_by_the_rule_of_image_folders(tmp_path):
    rng = np.random.default_rng(0)
    big = Image.fromarray(rng.integers(0, 255, (50, 70, 3)).astype('uint8'))
    big.convert('CMYK').save(tmp_path/'a.jpg')
    big.convert('L').save(tmp_path/'b.png')
    turned = Image.Exif()
    turned[0x0112] = 6
    big.save(tmp_path/'c.jpg', exif=turned, quality=95)
    (tmp_path/'.DS_Store').write_bytes(b'x')
    (tmp_path/'d.txt').write_text('no image')
    (tmp_path/'e.jpg').write_bytes((tmp_path/'c.jpg').read_bytes()[:400])
    x, names, bad = pixels_of(tmp_path)
    assert [Path(n).name for n in names] == ['a.jpg', 'b.png', 'c.jpg']
    assert sorted(Path(n).name for n in bad) == ['d.txt', 'e.jpg']
    for got, name in zip(x, names): assert torch.equal(got, as_tested(32)(open_image(name)))
    assert torch.equal(x[2], pixels_of(Image.open(tmp_path/'c.jpg'))[0][0]) # its turn is obeyed, too

@pytest.mark.parametrize('image, said', [
    ('missing.png', 'No such file or directory'),
    (np.zeros((4, 32, 32), 'uint8'), r'it is uint8 \(4, 32, 32\): give uint8'),
    (np.zeros((32, 32, 3)), 'it is float64'),
    (torch.zeros(3, 16, 16), 'it is torch.float32'),
    (torch.full((3, 32, 32), torch.nan), 'NaN or infinite'),
    (np.zeros((0, 5, 3), 'uint8'), 'it is uint8'),
])
def test_what_is_no_image_is_named_and_left_out(c, stream, image, said):
    good = stream[0].test.images[0]
    with pytest.warns(UserWarning, match=f'(?s)1 images are left out.*{said}'):
        table = c([image, good], task=0, progress=False)
    assert table.path.tolist() == ['image 1']
    with pytest.raises(ValueError, match=said): c([image, good], task=0, on_bad='refuse', progress=False)
    with pytest.raises(ValueError, match=said): c([image], task=0, progress=False)

@pytest.mark.parametrize('images', [7, None, b'abc', [3], dict(a=1)])
def test_what_holds_no_images_is_refused(c, images):
    with pytest.raises(ValueError, match='is no image: give paths, folders'): c(images, task=0, progress=False)

def test_an_empty_list_is_an_empty_table(c):
    assert c([], task=0, progress=False).empty and list(c([], task=0))[:4] == ['path', 'task', 'class', 'probability']

def test_many_images_are_read_a_few_at_a_time(c, stream, monkeypatch):
    whole = c(stream[0].test, task=0, progress=False)
    monkeypatch.setattr('moe_merge_nb.streams.given.AT_ONCE', 5*12*32**2)
    again = c.answers(stream[0].test, task=0, details=True, progress=False)
    assert [len(x) for x in chunks(listed(stream[0].test), 32)] == [5, 5, 5, 5, 4]
    assert again.table['class'].equals(whole['class']) and len(again.features) == len(again.logits) == 24
    np.testing.assert_allclose(again.table.probability, whole.probability, atol=1e-5)
