"""Looking at one image: what is shown is what the classifier says; the menus draw it."""
import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_model
from moe_merge_nb.run import explore
from moe_merge_nb.run.classify import Classifier
from moe_merge_nb.run.describe import words
from moe_merge_nb.run.explore import explorer, looked, show
from moe_merge_nb.select.gaussian import Gaussian
from moe_merge_nb.select.select import dataset_features
from moe_merge_nb.streams.prepare import main, unseen
from moe_merge_nb.streams.tasks import toy_stream

@pytest.fixture(scope='module')
def stream(): return toy_stream(2)

@pytest.fixture(scope='module')
def c(stream):
    "A classifier with a selector that looks at images; its adapters are random."
    model, tokenizer = toy_model()
    gaussian = Gaussian()
    for t in stream: gaussian.fit(*dataset_features(model.clip, t.calibration))
    return Classifier(model, tokenizer, [words(t) for t in stream], dict(gaussian=gaussian))

@pytest.mark.parametrize('asked', [{}, dict(task='circles'), dict(classes='all'), dict(classes=['red', 'blue'])])
def test_both_sides_are_what_the_classifier_says(c, stream, asked):
    image = stream[0].test.images[0]
    found, row = looked(c, image, **asked), c(image, progress=False, **asked).iloc[0]
    assert found.task == row.task and found.experts.index[0] == row['class']
    assert found.experts.iloc[0] == pytest.approx(row.probability)
    plain = c(image, progress=False, **{**asked, 'task': asked.get('task', row.task), 'selector': 'CLIP'}).iloc[0]
    assert found.clip.index[0] == plain['class'] and set(found.experts.index) <= set(found.clip.index)
    assert found.scores.to_dict() == pytest.approx(c.task_scores(image).iloc[0].to_dict())
    used = (found.gates > 0).sum(axis=1)
    assert found.gates.shape == (4, 4) and (used == 2).all() and np.allclose(found.gates.sum(axis=1), 1)
    assert torch.allclose(found.image, image.permute(1, 2, 0)/255, atol=1e-6)

def test_plain_clip_uses_no_expert_and_has_the_same_numbers_twice(c, stream):
    found = looked(c, stream[0].test.images[0], selector='CLIP')
    assert found.task == 'CLIP' and not found.gates.to_numpy().any()
    assert found.experts.to_dict() == found.clip[:5].to_dict()

def test_the_picture_has_a_panel_for_each(c, stream):
    fig = show(looked(c, stream[0].test.images[0], task='squares'))
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[0] == 'the image' and titles[2:4] == ['plain CLIP', 'experts of squares'] and len(titles) == 5
    bare = Classifier(c.model, c.tokenizer, c.tasks)
    assert not show(looked(bare, stream[0].test.images[0], task=0)).axes[1].axison

def test_more_or_less_than_one_image_is_refused(c, stream, tmp_path):
    with pytest.raises(ValueError, match='24 images were given: choose one'): looked(c, stream[0].test, task=0)
    with pytest.raises(ValueError, match='x.png: No such file'): looked(c, tmp_path/'x.png', task=0)

def test_the_menus_draw_what_they_say(c, stream, monkeypatch):
    pytest.importorskip('ipywidgets')
    asked = []
    monkeypatch.setattr(explore, 'looked', lambda c, image, **asked_: asked.append((image, asked_)))
    monkeypatch.setattr(explore, 'show', lambda look: None)
    box = explorer(dict(ours=c), {t.name: t.test for t in stream})
    run, task, classes, group, number = box.children[0].children
    assert task.options == ('(selector)', 'squares', 'circles') and number.max == 23
    task.value, group.value, number.value, classes.value = 'circles', 'circles', 3, 'red, blue'
    image, said = asked[-1]
    assert torch.equal(image, stream[1].test[3][0]) and said == dict(task='circles', classes=['red', 'blue'])
    assert asked[0][1] == dict(task=None, classes='task') and torch.equal(asked[0][0], stream[0].test[0][0])

def test_five_pictures_of_another_seed_are_drawn_with_their_classes_in_their_names(tmp_path, capsys):
    assert main(['pictures', str(tmp_path/'a')]) == 0
    paths = sorted((tmp_path/'a').iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(p) for p in paths] and len(paths) == 5
    domains = [p.name.partition('-')[0] for p in paths]
    assert domains == ['Caltech', 'Cars', 'Food', 'Pets', 'SUN'] and all(Image.open(p).size == (32, 32) for p in paths)
    other = unseen(tmp_path/'b', seed=2)
    assert [p.read_bytes() for p in sorted(other)] != [p.read_bytes() for p in paths]
