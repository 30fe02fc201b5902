"A report says where one run of these settings falls, where such runs are stored; and counts every run once"

from copy import deepcopy
from dataclasses import replace
import json
import re
from importlib.resources import files
import pytest
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.learn.method import describe
from moe_merge_nb.learn.pack import pack
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run.figures import NOTEBOOKS, STORED, beside_stored, chosen, tell
from moe_merge_nb.run.runs import distinguish, load_runs
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.study.measured import measured
from moe_merge_nb.study.one_run import beside, ranges, same_kind, _settings, _usual

STORED_RUNS = {name: measured(name) for name in ('mini', 'demo', 'main')}
MINI = STORED_RUNS['mini']

def said_of(runs): tell(runs, [], beside_stored(runs))

def demo(*methods): return [deepcopy(r) for r in STORED_RUNS['demo'] if r.config['method'] in methods]

@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    monkeypatch.setattr('moe_merge_nb.run.figures.measured', lambda name='mini': STORED_RUNS[name])
    monkeypatch.setattr('moe_merge_nb.run.figures.known_runs', lambda: MINI)

@pytest.mark.parametrize('name', METHODS)
def test_a_run_of_today_with_the_usual_settings_has_just_these(name):
    said = describe(toy_stream(1, n_train=4, n_test=2), METHODS[name], 0)
    assert _settings(json.loads(json.dumps(said))) == _usual(name)

@pytest.mark.parametrize('part, setting, value', [
    ('merge', 'every', 20), ('merge', 'protect', True), ('train', 'iterations', 151), ('experts', 'router', 'mlp'),
    ('freeze', 'n', 3), ('train', 'warmup', 3)])
def test_any_other_setting_is_another_kind(part, setting, value):
    [mine] = demo('moe_merge')
    assert sum(same_kind(mine, s) for s in MINI) == 5
    mine.config[part] = {**mine.config[part], setting: value}
    assert not any(same_kind(mine, s) for s in MINI)

def test_another_backbone_is_another_kind():
    [mine] = demo('moe')
    for other in (dict(model='random'), dict(pretrained='w.safetensors')):
        assert not any(same_kind(replace(mine, config=mine.config | other), s) for s in MINI)

def test_a_run_is_known_by_what_it_was_learned_by():
    [mine] = demo('moe')
    again = deepcopy(mine)
    again.config['seed'], again.config['train'] = 1, {**mine.config['train'], 'lr': .5}
    runs = distinguish([mine, again])
    assert [r.config['method'] for r in runs] == ['moe train.lr=0.01', 'moe train.lr=0.5']
    rows = ranges(runs, MINI)
    assert set(rows.method) == {'moe train.lr=0.01'} and len(rows) == 12

def test_every_seed_has_a_line_of_its_own():
    a, b = demo('moe') + demo('moe')
    b.config['seed'] = 1
    b.matrix = b.matrix.assign(accuracy=b.matrix.accuracy + 5)
    lines = beside(ranges([a, b], MINI)).Last
    assert lines.index.names == ['method', 'seed', 'selector'] and len(lines) == 8
    assert not lines['moe', 0, 'oracle'].endswith('!') and lines['moe', 1, 'oracle'].endswith(' !')

def test_the_command_prints_the_ranges_of_stored_kinds_only(capsys):
    said_of(demo('moe', 'moe_merge'))
    said = capsys.readouterr().out
    assert re.search(r'oracle +44\.8 \(44\.7 to 44\.9\)', said)
    assert 'One run of each cannot tell methods apart' in said
    assert 'moe_merge ends -1.19 points of Last from moe' in said and '24 pairs' in said
    said_of([example_result('moe'), example_result('moe_merge')])
    said = capsys.readouterr().out
    assert 'moe_merge' in said and ' to ' not in said and 'tell' not in said

def test_the_page_has_them_where_the_command_has():
    known, unknown = beside_stored(demo('moe')), beside_stored([example_result('moe')])
    assert 'one_run' in chosen(known)
    assert chosen(unknown) == [*NOTEBOOKS]
    assert chosen(known, with_stored=True)[-2:] == [*STORED]

def test_a_run_that_is_there_twice_counts_once(tmp_path, capsys):
    run = example_result('moe')
    run.config |= dict(config_hash='0123')
    for place in ('a', 'copy of a'): save_result(run, tmp_path/place)
    save_result(example_result('moe', 1), tmp_path/'b')
    assert [r.config['seed'] for r in load_runs([tmp_path])] == [0, 1]
    assert re.search('left out, the same run as .*/a: .*/copy of a\n', capsys.readouterr().err)

def test_packed_runs_of_before_are_all_kept(tmp_path):
    file = pack([example_result(m, s) for m in ('moe', 'moe_merge') for s in (0, 1)], tmp_path/'runs.csv.gz')
    assert len(load_runs([file])) == 4

def test_pictures_keep_their_size_on_a_narrow_page():
    style = (files('moe_merge_nb')/'data'/'report.html').read_text(encoding='utf-8')
    narrow = re.search(r'@media \(max-width: 60rem\) \{\s*img \{max-width: none\}', style)
    assert narrow and '.jp-RenderedImage, .jp-OutputArea-output {overflow-x: auto}' in style
