"""A finished run predicts in another way: what is kept, that it is found again, and what is refused."""
import json
import shutil
import sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.results import summary, three
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.views import STRATEGIES, averaged, make_strategy, strategy_name
from moe_merge_nb.run import cli
from moe_merge_nb.run.afterwards import check_given, predict_with
from moe_merge_nb.run.job import UsageError
from moe_merge_nb.run.line import as_text
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.job import job
from moe_merge_nb.run.figures import beside_stored, tell
from moe_merge_nb.run.runs import check_finished, load_all, load_runs
from moe_merge_nb.run.share import load
from moe_merge_nb.strategies.afterwards import known_in, opened, strategy_in
from moe_merge_nb.streams.tasks import toy_stream

SMALL = [
    'method=moe', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'train.iterations=12', 'train.warmup=2',
    'train.batch=8', 'experts.n_experts=6', 'experts.rank=2', 'selectors=[oracle,gaussian,none]', 'classes=[task,all]']
LEARNS = '''
import torch

class Shifted:
    "Adds to each class of the last task how often it was seen in training."
    def __init__(self, by=1.): self.by = by
    def fit(self, model, tokenizer, stream, seed=0, progress=True):
        labels = torch.tensor([int(y) for _, y in stream[-1].train])
        self.seen = labels.bincount().float() + seed
    def state(self): return dict(seen=self.seen)
    def restore(self, state): self.seen = state['seen']
    def __call__(self, view): return view.logits(view.s) * self.by

def upside_down(view): return -view.logits(view.s)
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with a finished run, and parts of one's own."
    d = tmp_path_factory.mktemp('afterwards')
    (d/'my_strategies.py').write_text(LEARNS)
    job(composed(*SMALL), d/'run', progress=False)
    return d

@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder

@pytest.fixture
def typed(here, monkeypatch, capsys):
    "What a command prints, and its exit code or message."
    def type_in(*arguments):
        monkeypatch.setattr(sys, 'argv', ['moe-merge', *arguments])
        try: cli.main()
        except SystemExit as e: return str(e.code), *capsys.readouterr()
        return '', *capsys.readouterr()
    return type_in

def last_rows(result):
    m = result.matrix
    return m[m.after == result.config['tasks'][-1]].reset_index(drop=True)


# ---- what is predicted

def test_the_strategy_of_the_run_gives_its_own_last_row_to_the_bit(here):
    r = load_result('run')
    again = predict_with('run', 'routed', progress=False)
    pd.testing.assert_frame_equal(again.matrix, last_rows(r))
    chosen = r.selection[r.selection.after == r.config['tasks'][-1]].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.selection, chosen)

def test_another_strategy_is_evaluated_with_every_selector_and_label_space(here):
    found = predict_with('run', 'averaged', progress=False)
    shared = load('run', trust=True)
    stream, how = toy_stream(2), dict(predict=averaged, classes=('task', 'all'), progress=False)
    how |= dict(after=stream.names[-1], cache=Cache(2048))
    by_hand = evaluate(shared.model, shared.tokenizer, stream, shared.selectors, **how)
    pd.testing.assert_frame_equal(found.matrix, by_hand.matrix)
    assert {*found.matrix.selector} == {f'{s}{end}' for s in ('oracle', 'gaussian', 'none') for end in ('', ' all')}
    [spent] = found.timings.values()
    assert {k: spent[k] for k in by_hand.passes} == by_hand.passes

def test_there_is_a_last_and_nothing_else_is_made_up(here):
    found = predict_with('run', 'averaged', progress=False)
    transfer, average, last = three(found, 'oracle')
    assert last == pytest.approx(found.matrix.query('selector == "oracle"').accuracy.mean())
    assert transfer != transfer and average != average
    assert summary(found)[['Transfer', 'Average']].isna().all(axis=None) and summary(found).Last.notna().all()

def test_the_model_is_that_of_the_run(here):
    model, _, selectors = opened(known_in('run'))
    theirs, x = load('run', trust=True).model, torch.randn(2, 3, 32, 32)
    for task in (None, 0, 1): assert torch.equal(model.encode_image(x, task), theirs.encode_image(x, task))
    assert [*selectors] == ['oracle', 'gaussian', 'none'] and selectors['none'].n_tasks == 2


# ---- what is kept

def test_a_prediction_is_kept_like_a_run_and_found_again(here, capsys):
    before = {p.name: p.read_bytes() for p in Path('run').iterdir()}
    first = predict_with('run', 'averaged', 'kept', progress=False)
    assert 'not run again' not in capsys.readouterr().err
    kept = load_result('kept', adapters=True, selectors=True, checked=True)
    pd.testing.assert_frame_equal(kept.matrix, first.matrix)
    assert kept.adapters is None and kept.strategy is None and not Path('kept/strategy.safetensors').exists()
    run = load_result('run')
    assert kept.config['predict'] == 'averaged' and kept.config['predicts']['run'] == run.config['config_hash']
    assert kept.config['config_hash'] != run.config['config_hash'] and kept.config['method'] == 'moe'
    assert {*json.loads(Path('kept/sha256.json').read_text())} >= {'config.json', 'matrix.csv', 'selection.csv'}
    again = predict_with('run', 'averaged', 'kept', progress=False)
    assert 'not run again: kept' in capsys.readouterr().err
    pd.testing.assert_frame_equal(again.matrix, first.matrix)
    assert {p.name: p.read_bytes() for p in Path('run').iterdir()} == before

def test_a_directory_with_another_prediction_is_refused(here):
    predict_with('run', 'contrast', 'numbers', options=dict(beta=.5), progress=False)
    predict_with('run', 'contrast', 'numbers', progress=False)                      # the default is .5
    with pytest.raises(ValueError, match=r'another predict_options.beta \(0.5, not 0.25\)'):
        predict_with('run', 'contrast', 'numbers', options=dict(beta=.25), progress=False)
    with pytest.raises(ValueError, match='another predict'): predict_with('run', 'averaged', 'numbers', progress=False)
    with pytest.raises(ValueError, match='another'): predict_with('run', 'averaged', 'run', progress=False)

def test_one_that_was_killed_as_it_was_written_is_made_again(here):
    first = predict_with('run', 'averaged', 'killed', progress=False)
    Path('killed/config.json').unlink()                                             # it is written last
    again = predict_with('run', 'averaged', 'killed', progress=False)
    pd.testing.assert_frame_equal(again.matrix, first.matrix)
    assert Path('killed/config.json').is_file()

def test_what_a_strategy_learns_is_kept_and_comes_back(here):
    found = predict_with('run', 'my_strategies.Shifted', 'learned', options=dict(by=2.), progress=False)
    seen = torch.tensor([int(y) for _, y in toy_stream(2)[-1].train]).bincount().float()
    assert torch.equal(found.strategy['seen'], seen)
    back = strategy_in('learned')
    assert type(back).__name__ == 'Shifted' and back.by == 2 and torch.equal(back.seen, seen)
    config = load_result('learned').config
    assert config['predict_options'] == {'by': 2.0} and len(config['sources']['my_strategies.Shifted']) == 64
    assert 'strategy.safetensors' in json.loads(Path('learned/sha256.json').read_text())
    data = bytearray(Path('learned/strategy.safetensors').read_bytes())
    data[-1] ^= 1
    Path('learned/strategy.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='damaged, or changed'): strategy_in('learned')

def test_an_object_with_numbers_is_the_same_as_a_name_with_options(here):
    kind = type(make_strategy('contrast'))
    assert strategy_name(kind) == strategy_name(kind()) == 'contrast' and strategy_name(averaged) == 'averaged'
    one = predict_with('run', kind(beta=.25), progress=False)
    two = predict_with('run', 'contrast', options=dict(beta=.25), progress=False)
    assert one.config['config_hash'] == two.config['config_hash']


# ---- what is refused

class Odd:
    def __call__(self, view): return view.logits(view.s)

@pytest.mark.parametrize('strategy, options, message', [
    ('average', {}, "did you mean 'averaged'"),
    ('averaged', dict(beta=1), "has no option 'beta'; it has "),
    ('contrast', dict(beat=1), r"has no option 'beat'; it has \['beta', 'rank', 'alpha'\]"),
    ('contrast', dict(beta=-1), 'beta is -1: choose 0'),
    (Odd(), {}, 'whose numbers are not known'),
    (lambda view: view.features.sum(), {}, 'returned'),
])
def test_a_strategy_that_cannot_be_is_refused_by_name(here, strategy, options, message):
    with pytest.raises(ValueError, match=message): predict_with('run', strategy, options=options, progress=False)

def test_what_no_other_process_finds_again_is_not_kept(here):
    def mine(view): return view.logits(view.s)
    assert len(predict_with('run', mine, progress=False).matrix)
    with pytest.raises(ValueError, match='no other process can import'):
        predict_with('run', mine, 'mine', progress=False)
    assert not Path('mine').exists()

def test_a_strategy_that_learns_is_for_finished_runs(here):
    with pytest.raises(UsageError, match='predict=my_strategies.Shifted from=RUN'):
        job(composed(*SMALL, 'predict=my_strategies.Shifted'), progress=False)

def test_other_images_and_predictions_of_predictions_are_refused(here):
    with pytest.raises(ValueError, match='are not those that the run saw'):
        predict_with('run', 'averaged', stream=toy_stream(2, seed=3), progress=False)
    predict_with('run', 'averaged', 'once', progress=False)
    with pytest.raises(ValueError, match='give the run itself'): predict_with('once', 'averaged', progress=False)

@pytest.mark.parametrize('given, message', [
    (['from=run'], 'say predict=STRATEGY or rewrite=RULE'),
    (['predict=averaged', 'from=run', 'seed=1'], 'seed is given with predict and from'),
    (['predict=averaged', 'from=run', 'selectors=[none]'], 'selectors is given with'),
])
def test_a_setting_of_the_run_is_not_said_anew(given, message):
    with pytest.raises(UsageError, match=message): check_given(given)


# ---- the commands

def test_the_command_predicts_says_where_and_finds_it_again(typed, here):
    line = ['predict=contrast', 'from=run', 'predict_options={beta:0.25}', 'threads=1']
    code, out, err = typed(*line)
    assert code == '' and 'NaN' not in out and 'contrast' in out, err
    where = Path(out.splitlines()[-1].strip())
    assert where.parts[:2] == ('runs', 'predicted') and load_result(where).config['predict_options']['beta'] == .25
    pd.testing.assert_frame_equal(
        load_result(where).matrix, predict_with('run', 'contrast', options=dict(beta=.25), progress=False).matrix)
    code, again, err = typed(*line)
    assert code == '' and again == out and 'not run again' in err

def test_a_sweep_over_numbers_has_a_directory_for_each(typed, here):
    code, out, err = typed('-m', 'predict=contrast', 'from=run', 'predict_options={beta:0.1},{beta:0.3}', 'threads=1')
    found = [load_result(p.parent) for p in Path('runs/predicted').glob('*/config.json')]
    assert code == '' and {.1, .3} <= {r.config['predict_options']['beta'] for r in found}, err

@pytest.mark.parametrize('line, message', [
    (['predict_options={beta:1}'], 'predict_options is given without from'),
    (['predict=contrast', 'from=run', 'predict_options=5'], 'predict_options is 5'),
    (['predict=contrast', 'from=nowhere/run'], 'no file or directory nowhere/run, and no nowhere'),
    (['predict=contrast', 'from=rum'], 'there is no file or directory rum: in . there is run'),
    (['rewrite=msmoe', 'budget=3', 'from=rum'], 'there is no file or directory rum: in . there is run'),
    (['extend=rum', 'stream=toy'], 'there is no file or directory rum: in . there is run'),
    (['unlearn=circles', 'from=rum'], 'there is no file or directory rum: in . there is run'),
    (['predict=contrast', 'from=run', 'predict_options=rank:2'], 'in quotes, because a shell'),
    (['predict=contrast', 'from=run', 'predict_options.bet=1'], "no option 'bet'"),
    (['predict=contrast', 'from=run', 'predict_options={"bet":1}'], "no option 'bet'"),
])
def test_the_command_says_in_one_line_what_can_be_mended(typed, line, message):
    code, out, err = typed(*line)
    assert message in code and code.startswith('moe-merge: ') and 'Traceback' not in err

@pytest.mark.parametrize('line', [
    ['predict=averaged', 'from=half'], ['unlearn=circles', 'from=half'], ['extend=half', 'stream=toy'],
    ['rewrite=msmoe', 'budget=3', 'from=half']])
def test_a_run_that_is_not_finished_is_refused(typed, here, line):
    Path('half').mkdir(exist_ok=True)
    Path('half/checkpoint.safetensors').write_bytes(b'as a run leaves it')
    assert typed(*line)[0] == 'moe-merge: half is not finished: give the command that began it again'

def test_a_finished_run_may_have_a_checkpoint_left(here, tmp_path):
    shutil.copytree('run', tmp_path/'left')
    (tmp_path/'left'/'checkpoint.safetensors').write_bytes(b'of a process that was killed before it removed it')
    check_finished(tmp_path/'left')
    config = tmp_path/'left'/'config.json'
    said = json.loads(config.read_text())
    said.pop('finished')                                                            # as between two tasks
    config.write_text(json.dumps(said))
    with pytest.raises(ValueError, match='left is not finished'): check_finished(tmp_path/'left')

def test_what_is_refused_leaves_no_directory_and_takes_none_away(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'no file or directory' in typed('predict=averaged', 'from=nowhere')[0]
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())

def test_numbers_one_by_one_or_as_json_are_those_in_braces():
    said = ['+predict_options.beta=0.3', 'predict_options={beta:0.3}', "unlearn_options={loss:'npo',steps:5}"]
    given = ['predict_options.beta=0.3', 'predict_options={"beta":0.3}', 'unlearn_options={"loss":"npo","steps":5}']
    assert [*map(as_text, given)] == said
    assert as_text('predict_options={"beta":0.1},{"beta":0.5}', True) == 'predict_options={beta:0.1},{beta:0.5}'
    assert composed(said[0]).predict_options == composed(said[1]).predict_options == {'beta': .3}

def test_the_report_gives_a_prediction_a_row_of_its_own(here, tmp_path, capsys):
    for beta in (.25, .5): predict_with('run', 'contrast', tmp_path/str(beta), options=dict(beta=beta), progress=False)
    predict_with('run', 'my_strategies.upside_down', tmp_path/'own', progress=False)
    runs, predictions = load_all(['run', tmp_path])
    assert [r.config['method'] for r in runs] == ['moe'] and len(load_runs(['run', tmp_path])) == 1
    tell(runs, predictions, beside_stored(runs))
    lines = capsys.readouterr().out.splitlines()
    named = [r.config['method'] for r in predictions]
    assert sorted(n.split()[1] for n in named) == ['predict=contrast'] * 2 + ['predict=my_strategies.upside_down']
    assert all('predict_options.beta=0.25' in n or 'beta=0.5' in n for n in named if 'contrast' in n)
    last = {r.config['method']: summary(r).query('selector == "oracle"').Last.item() for r in predictions}
    for name, value in last.items():
        [line] = [line for line in lines if line.startswith(f'{name} ')]
        assert f'{value:.1f} (1)' in line and line.count('(1)') == 1
    with pytest.raises(ValueError, match='name the runs, too'): load_runs([tmp_path])
