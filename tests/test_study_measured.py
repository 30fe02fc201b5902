import pandas as pd, pytest, torch
from pathlib import Path
from tempfile import TemporaryDirectory
from moe_merge_nb.study.measured import STUDY, about, frozen_last, invented, measured, ordered, store
from moe_merge_nb.learn.results import accuracy_matrix, example_result
from itertools import product
from moe_merge_nb.learn.results import field_of
from moe_merge_nb.run.config import CHANGES, EXPERIMENTS
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.study.changes import change_of, defaults_of

def asked(experiment):
    "What an experiment's jobs differ in: method, change, method seed, data seed, order, shots, shared blocks."
    grid = EXPERIMENTS[experiment]
    for values in product(*grid.values()):
        job = dict(zip(grid, values))
        data = job['seed'] if job.get('data_seed') == '${seed}' else job.get('data_seed', 0)
        blocks = job.get('experts.shared_blocks', 0)
        yield job['method'], job.get('change'), job['seed'], data, job.get('order', 1), job.get('shots'), blocks
DEFAULTS = defaults_of(METHODS)
SHARED = {f'{n} blocks': {'experts.shared_blocks': n} for n in (1, 2, 3, 4)}

def kept(run):
    "What `asked` says, of a stored run."
    c, change, blocks = run.config, change_of(run, CHANGES | SHARED, DEFAULTS), 0
    if change in SHARED: change, blocks = None, SHARED[change]['experts.shared_blocks']
    shots = int(field_of(run, 'shots') or 0) or None
    return c['method'], change, c['seed'], c['data_seed'], c['order'], shots, blocks


def test_stored_runs_come_back_with_all_their_numbers():
    runs = [example_result(m, s) for m in ('moe', 'moe_merge', 'finetune') for s in range(2)]
    zips = {f'mini-{m}-seed0.zip' for m in ('moe', 'moe_merge', 'finetune')}
    with TemporaryDirectory() as d:
        assert {p.name for p in store(runs, 'mini', d)} == {'mini.csv.gz', *zips}
        back = {(r.config['method'], r.config['seed']): r for r in measured('mini', d)}
    for r in runs:
        b = back[r.config['method'], r.config['seed']]
        for s in ('oracle', 'gaussian'): assert (accuracy_matrix(b, s) == accuracy_matrix(r, s)).all()
        if r.config['seed'] == 0: assert b.events == r.events and len(b.usage) == len(r.usage)
        else: assert b.usage.empty


def test_only_the_experts_frozen_last_keep_their_weights():
    r = example_result('moe')
    r.adapters = {f'{i}.experts.{e}.up.bias': torch.zeros(2) for i in range(7) for e in range(8)}
    with TemporaryDirectory() as d:
        store(r, 'x', d)
        back = measured('x', d)[0]
    blocks = ('image 0', 'image 1', 'image 2', 'image 3', 'text 0', 'text 1', 'text 2')
    last = [frozen_last(r)[b] for b in blocks]
    expected = {f'{i}.experts.{e}.up.bias' for i, pair in enumerate(last) for e in pair}
    assert set(back.adapters) == expected and len(expected) == 14


def test_the_stored_runs_are_those_that_make_study_makes():
    for name, experiments in STUDY.items():
        rows = sorted(map(kept, measured(name)), key=str)
        jobs = sorted((j for e in experiments for j in asked(e)), key=str)
        assert rows == jobs, (name, [j for j in jobs if j not in rows], [r for r in rows if r not in jobs])
    for run in measured('main') + measured('controls'):
        assert any(s.endswith(' all') for s in run.matrix.selector.unique())
