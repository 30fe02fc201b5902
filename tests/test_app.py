"""The app: what it says of a picture; where Gradio, Playwright and Chromium are, the page in a browser, too."""
import os
import shutil
import socket
from urllib.parse import urlsplit
import numpy as np
import pytest
import torch
from PIL import Image
from moe_merge_nb.run import app
from moe_merge_nb.run.classify import Classifier
from moe_merge_nb.run.describe import words
from moe_merge_nb.select.gaussian import Gaussian
from moe_merge_nb.select.select import dataset_features
from moe_merge_nb.streams.tasks import toy_stream
from toys import toy_model

STREAM = toy_stream(n_tasks=2, n_train=32)


@pytest.fixture(scope='module')
def c():
    "A classifier whose selector tells two toy tasks apart; its adapters are random."
    model, tokenizer = toy_model()
    selector = Gaussian()
    for task in STREAM: selector.fit(*dataset_features(model.clip, task.train))
    return Classifier(model, tokenizer, [words(t) for t in STREAM], {'gaussian': selector})


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    "A training image of the second task as a file."
    path = tmp_path_factory.mktemp('app')/'picture.png'
    Image.fromarray(STREAM[1].train.images[0].permute(1, 2, 0).numpy()).save(path)
    return str(path)


def test_what_is_seen_is_what_both_models_say(c, picture):
    seen, image = app.look(c, picture), STREAM[1].train[0][0][None]
    assert seen.task == STREAM.names[1] and min(seen.distances, key=seen.distances.get) == seen.task
    for found, routers in ((seen.adapted, 1), (seen.plain, None)):
        z, w = c.model.encode_image(image, routers), c.encoder.classes(words(STREAM[1]), -1 if routers is None else 1)
        p = (c.model.logit_scale.exp() * torch.nn.functional.normalize(z, dim=-1) @ w.T).softmax(-1)[0]
        assert list(found) == [STREAM[1].classes[i] for i in p.argsort(descending=True)]
        np.testing.assert_allclose(list(found.values()), p.sort(descending=True).values.detach(), atol=1e-4)
    assert [g.shape for g in seen.gates] == [(4,)] * 4
    assert all((g > 0).sum() == 2 and g.sum() == pytest.approx(1) for g in seen.gates)


def test_own_words_and_a_task_of_ones_choice(c, picture):
    seen = app.look(c, picture, ['a dog', 'a cat'], task=0)
    assert seen.task == STREAM.names[0] and set(seen.plain) == set(seen.adapted) == {'a dog', 'a cat'}
    assert app.words_in(' a dog,,a cat\na dog ') == ['a dog', 'a cat'] and app.words_in(None) == []


def test_a_picture_that_belongs_nowhere_is_for_plain_clip(c, picture, monkeypatch):
    selector = c.selectors['gaussian']
    monkeypatch.setattr(selector, 'thresholds', selector.thresholds/1000)
    seen = app.look(c, picture)
    assert min(seen.distances.values()) > 1 and seen.task == app.PLAIN and seen.adapted == seen.plain
    assert set(seen.plain) <= {name for t in STREAM for name in t.classes} and len(seen.plain) == app.TOP
    assert not any(g.any() for g in seen.gates)
    assert 'plain CLIP: no task accepts it' in app.shown_as(seen)[0]


def test_without_a_selector_the_task_must_be_said(c, picture):
    alone = Classifier(c.model, c.tokenizer, c.tasks)
    assert app.chooses(c) and not app.chooses(alone)
    with pytest.raises(ValueError, match='say which task'): app.look(alone, picture)
    assert app.look(alone, picture, task=1).distances == {}
    assert app.bars({}) is None and app.heat_map([]) is None


def test_what_is_no_picture_is_said(c, tmp_path):
    (tmp_path/'note.png').write_text('no picture')
    with pytest.raises(ValueError, match='no picture that can be read'): app.look(c, str(tmp_path/'note.png'))


def test_names_are_no_markup():
    name = '<b>x</b> [a](http://b)'
    said, *_ = app.shown_as(app.Seen(name, {}, {name: 1.}, {name: 1.}, []))
    assert '<' not in said and '[' not in said and '](' not in said


def test_without_gradio_there_is_one_line_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(app, 'find_spec', lambda name: None)
    assert app.main(['no/such/run']) == 2
    assert capsys.readouterr().err == 'moe-merge-app: this needs gradio: pip install "moe_merge_nb[app]"\n'


def browser(playwright):
    "Debian's Chromium, with a camera that is none."
    camera = ['--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream']
    return playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox', *camera])


def listened(page):
    "Hosts that the page asks, and what is wrong in its console."
    hosts, wrong = set(), []
    page.on('request', lambda r: hosts.add(urlsplit(r.url).hostname) if r.url.startswith(('http', 'ws')) else None)
    page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    return hosts, wrong


def used(page, first, picture, note):
    "What a new user does: a picture, own words, no picture, the camera; each is answered."
    page.set_input_files('input[type=file]', picture)
    page.get_by_text(f'{first}, by the experts of {STREAM.names[1]}').wait_for()
    page.get_by_label('Classes of your own').fill('a dog')
    page.keyboard.press('Enter')
    page.get_by_text(f'a dog, by the experts of {STREAM.names[1]}').wait_for()
    assert page.evaluate('document.documentElement.scrollWidth') <= 420
    page.get_by_label('Remove Image').click()
    page.get_by_text(app.START).wait_for()
    page.set_input_files('input[type=file]', note)
    page.get_by_text('no picture that can be read').wait_for()
    page.get_by_label('Remove Image').click()
    page.get_by_label('Capture from camera').click()
    page.get_by_text('Click to Access Webcam').click()
    page.wait_for_function("document.querySelector('video')?.currentTime > .5") # it shows something
    page.get_by_label('capture photo').click()
    page.get_by_text('a dog, by ').wait_for()


@pytest.fixture
def asked(monkeypatch):
    "Where this process connects to."
    hosts, connect = set(), socket.socket.connect
    def noted(self, address):
        if self.family != socket.AF_UNIX: hosts.add(address[0])
        return connect(self, address)
    monkeypatch.setattr(socket.socket, 'connect', noted)
    return hosts


@pytest.mark.skipif(not shutil.which('chromium'), reason='no browser')
def test_in_a_browser_a_picture_is_answered_and_nothing_leaves_the_machine(c, picture, tmp_path, asked):
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False' # as `main` does
    pytest.importorskip('gradio') # a development check: pip install -e '.[app]' playwright
    sync_playwright = pytest.importorskip('playwright.sync_api').sync_playwright
    (tmp_path/'note.png').write_text('no picture')
    first = next(iter(app.look(c, picture).adapted))
    made = app.page(c)
    address = app.serve(made, wait=False)
    try:
        with sync_playwright() as p:
            page = browser(p).new_page(viewport=dict(width=420, height=900))
            hosts, wrong = listened(page)
            page.set_default_timeout(60_000)
            page.goto(address)
            used(page, first, picture, str(tmp_path/'note.png'))
    finally: made.close()
    assert address.startswith('http://127.0.0.1:')
    assert hosts == {'127.0.0.1'} and wrong == []
    assert asked == {'127.0.0.1'}
