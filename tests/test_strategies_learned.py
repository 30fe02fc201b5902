"""Strategies that learn from training images, on a finished run: from the command line and in Python, killed and begun
again, kept like a run and brought back."""
import json
import os
from pathlib import Path
import pandas as pd
import pytest
import torch
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run.afterwards import predict_with
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.runs import load_all
from moe_merge_nb.strategies.afterwards import strategy_in
from toys import begin, end, killed

SMALL = [
    'method=moe', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'train.iterations=12', 'train.warmup=2',
    'train.batch=8', 'experts.n_experts=6', 'experts.rank=2', 'selectors=[oracle,text]', 'classes=[task,all]']
OPTIONS = {'cognitive': dict(beta=4., least=4), 'meta': dict(episodes=12, images=40)}
KEPT = ['matrix.csv', 'selection.csv', 'strategy.safetensors']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder with a finished run, from which everything is started."
    before, d = Path.cwd(), tmp_path_factory.mktemp('learned')
    os.chdir(d)
    job(composed(*SMALL), d/'run', progress=False)
    yield d
    os.chdir(before)

@pytest.mark.parametrize('name', OPTIONS)
def test_it_is_kept_reported_and_brought_back(here, name):
    found = predict_with('run', name, f'kept-{name}', options=OPTIONS[name], progress=False)
    assert {*found.matrix.selector} == {'oracle', 'oracle all', 'text', 'text all'}
    kept = load_result(f'kept-{name}', selectors=True, checked=True)
    assert kept.config['predict'] == name and OPTIONS[name].items() <= kept.config['predict_options'].items()
    assert {*json.loads(Path(f'kept-{name}/sha256.json').read_text())} >= {*KEPT}
    back = strategy_in(f'kept-{name}').state()
    assert back.keys() == found.strategy.keys() and all(torch.equal(back[k], v) for k, v in found.strategy.items())
    [named] = [r.config['method'] for r in load_all(['run', f'kept-{name}'])[1]]
    assert f'predict={name}' in named

@pytest.mark.parametrize('name', OPTIONS)
def test_the_command_killed_and_begun_again_gives_what_python_gives(here, name):
    said = ','.join(f'{k}:{v}' for k, v in OPTIONS[name].items())
    line = ['from=run', 'threads=1', f'predict={name}', f'predict_options={{{said}}}', f'hydra.run.dir=line-{name}']
    assert killed(begin(line), f'line-{name}')
    assert not Path(f'line-{name}/sha256.json').exists()
    assert end(begin(line)) == 0, Path('err.txt').read_text()
    predict_with('run', name, f'python-{name}', options=OPTIONS[name], progress=False)
    for file in KEPT: assert Path(f'line-{name}', file).read_bytes() == Path(f'python-{name}', file).read_bytes(), file

def test_meta_predicts_as_the_run_where_no_image_is_foreign(here):
    run = load_result('run').matrix
    found = predict_with('run', 'meta', options=OPTIONS['meta'], progress=False).matrix
    last = run[run.after == run.after.iloc[-1]].reset_index(drop=True)
    oracle = last.selector.str.startswith('oracle')
    pd.testing.assert_frame_equal(found[oracle], last[oracle])
