"""Which runs of a user's own sweep are one row of a table, and which must not be: by what decides numbers."""
import json
from dataclasses import replace
import pytest
from moe_merge_nb.learn.saved import load_result, save_result
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.report import main
from moe_merge_nb.run.runs import distinguish, load_runs
from moe_merge_nb.study.tables import table

TINY = 'stream=toy stream.n_tasks=2 stream.n_test=6 model=toy train.batch=8 train.iterations=2'.split()
TINY += ['experts.n_experts=4', 'experts.rank=2', 'selectors=[oracle]']

@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    "Two methods x two seeds, as the command line makes them."
    d = tmp_path_factory.mktemp('sweep')
    for m, more in (('moe', []), ('moe_merge', ['merge.every=1'])):
        for s in (0, 1): job(composed(*TINY, *more, f'method={m}', f'seed={s}'), str(d/f'{m}{s}'), False)
    return d

def runs(sweep, **changed):
    "All runs of the sweep; those whose directory is named are changed by a function."
    found = {p.parent.name: load_result(p.parent, adapters=True) for p in sorted(sweep.rglob('config.json'))}
    for name, change in changed.items():
        config = json.loads(json.dumps(found[name].config))
        found[name] = replace(found[name], config={**config, **change(config)})
    return list(found.values())

def names(results): return [r.config['method'] for r in distinguish(results)]

def test_seeds_of_a_users_own_sweep_are_averaged(sweep):
    rows = table(load_runs([sweep]))
    assert list(rows.index) == [('moe', 'oracle'), ('moe_merge', 'oracle')]
    assert all(cell.endswith('(2)') for cell in rows.to_numpy().ravel())

def test_how_a_run_was_made_makes_no_other_row(sweep):
    elsewhere = lambda config: dict(
        commit='abc', dirty=True, seconds=7., device='NVIDIA H100', processes=4, machine='arm64', threads=8,
        programs=[{}, {}], finished='yesterday', config_hash='0', selectors=['oracle', 'gaussian'], anything='new')
    assert names(runs(sweep, moe0=elsewhere, moe_merge1=elsewhere)) == ['moe', 'moe', 'moe_merge', 'moe_merge']

def test_what_decides_numbers_makes_another_row_and_names_it(sweep):
    other = lambda config: dict(train={**config['train'], 'lr': .5})
    lr = runs(sweep)[0].config['train']['lr']
    assert names(runs(sweep, moe0=other)) == ['moe train.lr=0.5', f'moe train.lr={lr}', 'moe_merge', 'moe_merge']
    rule = lambda digest: lambda config: dict(
        merge={**config['merge'], 'combine': 'r.f'}, sources={'r.f': digest})
    a, b = names(runs(sweep, moe_merge0=rule('aa'), moe_merge1=rule('bb')))[2:]
    assert a.startswith('moe_merge functions=') and b.startswith('moe_merge functions=') and a != b
    assert names(runs(sweep, moe_merge0=rule('aa'), moe_merge1=rule('aa')))[2:] == ['moe_merge']*2

def test_other_images_or_another_backbone_are_named_in_all_rows(sweep):
    def root(name): return lambda c: dict(data_sha256={'squares': name}, stream_made={**c['stream_made'], 'root': name})
    assert names(runs(sweep, moe0=root('A'), moe1=root('A'), moe_merge0=root('C'), moe_merge1=root('C'))) == [
        'moe root=A', 'moe root=A', 'moe_merge root=C', 'moe_merge root=C']
    def drawing(seed): return lambda c: dict(data_seed=seed, data_sha256={'squares': str(seed)})
    assert names(runs(sweep, moe0=drawing(1), moe_merge0=drawing(1))) == ['moe', 'moe', 'moe_merge', 'moe_merge']
    weights = lambda c: dict(backbone_sha256='other')
    a, b, c, d = names(runs(sweep, moe0=weights, moe_merge0=weights))
    assert a.startswith('moe backbone=') and a != b and a.split()[1] == c.split()[1] and b.split()[1] == d.split()[1]

@pytest.mark.parametrize('name, value', [('method', None), ('method', ['moe']), ('seed', None), ('stream', 3)])
def test_a_run_that_does_not_say_which_it_is_is_a_message(sweep, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.setattr('moe_merge_nb.run.report.begin', lambda stack: [])
    r = runs(sweep)[0]
    r.config[name] = value
    save_result(r, tmp_path/'run')
    assert main([str(tmp_path), '--quiet']) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and f'{tmp_path/"run"}: {name} is {value!r}' in said
