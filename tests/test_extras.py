"""What only some need is in an extra, is imported where it is used, and is named with its command where it is missing;
figure notebooks travel without their pictures."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
import pytest
import setuptools
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run import command, report

ROOT = Path(__file__).parents[1]
HEAVY = ('sklearn', 'nbclient', 'nbconvert', 'ipykernel', 'jupyter_client', 'datasets')

def test_what_few_need_is_not_imported_with_the_rest():
    code = ('import sys, moe_merge_nb.all, moe_merge_nb.run.report, moe_merge_nb.rewrites.rules, moe_merge_nb.run.job; '
            f'print(*[m for m in {HEAVY} if sys.modules.get(m)])')
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    said = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == []

def test_without_the_extra_a_report_is_its_table_and_one_line(tmp_path, monkeypatch, capsys):
    for seed in (0, 1): save_result(example_result('moe', seed), tmp_path/f'run{seed}')
    for name in ('nbclient', 'nbconvert'): monkeypatch.setitem(sys.modules, name, None) # as if not installed
    assert report.main([str(tmp_path), '--quiet']) == 2
    out, err = capsys.readouterr()
    assert 'moe' in out and '(2)' in out
    assert err == "moe-merge-report: the page needs nbclient, nbconvert: pip install 'moe_merge_nb[report]'\n"
    assert not (tmp_path/'report.html').exists()

@pytest.fixture(scope='module')
def setup():
    "The arguments of setuptools.setup, and what stands beside the call."
    given, before = {}, setuptools.setup
    setuptools.setup = lambda **how: given.update(how)
    try: names = runpy.run_path(str(ROOT/'setup.py'))
    finally: setuptools.setup = before
    return given, names

def test_the_extras_are_no_requirements(setup):
    given, _ = setup
    assert given['extras_require']['report'] == ['nbclient', 'nbconvert', 'ipykernel']
    assert {*given['extras_require']['report']} <= {*given['extras_require']['dev']}
    assert 'datasets' in given['extras_require']['hf']
    assert not {*given['install_requires']} & {'nbclient', 'nbconvert', 'ipykernel', 'datasets', 'transformers'}

def test_figure_notebooks_lose_what_they_have_shown_and_nothing_else(setup):
    without_outputs = setup[1]['without_outputs']
    text = (ROOT/'nbs'/'figures'/'table2_mtil.ipynb').read_text(encoding='utf-8')
    before, after = json.loads(text), json.loads(without_outputs(text))
    assert any(c.get('outputs') for c in before['cells']) and not any(c.get('outputs') for c in after['cells'])
    assert [c['source'] for c in before['cells']] == [c['source'] for c in after['cells']]

@pytest.mark.parametrize('before', [None, '0'])
def test_a_command_leaves_the_environment_as_it_was(before, monkeypatch):
    monkeypatch.delenv('HYDRA_FULL_ERROR', raising=False)
    if before is not None: monkeypatch.setenv('HYDRA_FULL_ERROR', before)
    monkeypatch.setattr(sys, 'argv', ['moe-merge', 'stream=no_such_file.f'])
    with pytest.raises(SystemExit, match='moe-merge: .*no_such_file'): command.start()
    assert os.environ.get('HYDRA_FULL_ERROR') == before
