"""`moe-merge-predict` names the classes of images, and in one line each what it could not read or answer."""
from dataclasses import replace
from pathlib import Path
import pandas as pd
import pytest
from PIL import Image
from moe_merge_nb.baselines.methods import TRAIN, method
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.learn.loop import run
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.predict import main
from moe_merge_nb.streams.tasks import toy_stream

@pytest.fixture(scope='module')
def there(tmp_path_factory):
    "A folder with a run, a run without selectors that look at images, and six pictures of another seed."
    d, train = tmp_path_factory.mktemp('predict'), replace(TRAIN, iterations=8, warmup=2, batch=8)
    for name, selectors in (('run', ('oracle', 'gaussian')), ('told', ('oracle',))):
        ours = replace(method('moe', train=train), experts=Experts(n_experts=4, rank=4), selectors=selectors)
        run(toy_stream(2, n_train=60), ours, seed=0, backbone=load_clip(), directory=d/name, progress=False)
    for i, task in enumerate(toy_stream(2, seed=7)):
        (d/'pictures'/task.name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(task.test.images[k].permute(1, 2, 0).numpy()).save(d/'pictures'/task.name/f'{k}.png')
    return d

@pytest.fixture
def typed(there, monkeypatch, capsys):
    "Exit code and both outputs of a command in that folder."
    monkeypatch.chdir(there)
    def type_in(*arguments):
        code = main(list(arguments))
        return code, *capsys.readouterr()
    return type_in

def test_it_prints_a_line_per_image(typed, there):
    code, out, err = typed('run', 'pictures', '--top', '2')
    found = load_classifier(there/'run')(there/'pictures')
    head, *lines = out.splitlines()
    assert code == 0 and not err and head.split() == ['image', 'task', 'class', 'or', 'else']
    for line, r in zip(lines, found.itertuples(), strict=True):
        assert line.split()[0] == str(Path(r.path).relative_to(there)) and line.split()[1] == r.task
        assert f'{r[3]}  ' in line and f'{r.probability:.0%}' in line and r.class_2 in line

def test_it_writes_numbers_that_no_spreadsheet_takes_for_a_formula(typed, there):
    (there/'=1.png').write_bytes((there/'pictures/squares/0.png').read_bytes())
    kinds = ['--classes', 'red square, blue square', '--template', 'a {}']
    code, _, _ = typed('run', '=1.png', *kinds, '--csv', 'out.csv')
    table = pd.read_csv('out.csv')
    assert code == 0 and table.path[0] == "'=1.png" and table['class'][0] in ('red square', 'blue square')
    want = load_classifier('run')('=1.png', classes=['red square', 'blue square'], templates=['a {}'])
    assert table.probability[0] == pytest.approx(want.probability[0], abs=1e-6)

def test_what_is_no_image_is_named_and_left_out(typed, there):
    Path('broken.jpg').write_bytes(b'no picture')
    code, out, err = typed('run', 'broken.jpg', 'nowhere/*.png', 'pictures/squares/0.png')
    assert code == 0 and len(out.splitlines()) == 2
    broken, missing = err.splitlines()
    assert broken.startswith('moe-merge-predict: left out: broken.jpg: it is none of JPEG, PNG')
    assert missing == 'moe-merge-predict: left out: nowhere/*.png: No such file or directory'
    assert typed('run', 'broken.jpg', 'nowhere.png')[:2] == (1, '')

@pytest.mark.parametrize('arguments, said', [
    (['nothing', 'pictures'], 'nothing is not there'),
    (['run', 'pictures', '--task', 'rings'], "task is 'rings': choose one of squares, circles"),
    (['run', 'pictures', '--selector', 'text'], "selector is 'text', but there are"),
    (['told', 'pictures'], 'nothing tells which task an image is of: say which task (squares, circles)'),
    (['run', 'pictures', '--classes', 'cat,cat'], 'classes with the same name'),
    (['run', 'pictures', '--top', '0'], 'top is 0'),
    (['run', 'pictures', '--device', 'toaster'], 'toaster'),
])
def test_what_cannot_be_answered_ends_in_one_line(typed, arguments, said):
    code, out, err = typed(*arguments)
    assert code == 2 and not out and err.startswith('moe-merge-predict: ') and said in err and 'Traceback' not in err

def test_a_run_without_selectors_answers_for_a_task(typed, there):
    code, out, _ = typed('told', 'pictures/circles', '--task', 'circles', '--classes', 'all')
    assert code == 0 and [line.split()[1] for line in out.splitlines()[1:]] == 3*['circles']

def test_a_shared_file_says_what_the_run_says(typed, there):
    from moe_merge_nb.run.share import load
    load(there/'run').save(there/'ours.safetensors')
    assert typed('ours.safetensors', 'pictures') == typed('run', 'pictures')
