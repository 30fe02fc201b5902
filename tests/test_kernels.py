"""The kernels of a report begin before the package is imported, and end with the report however that ends."""
import subprocess
import sys
from pathlib import Path
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run import figures, kernels, report
from moe_merge_nb.run.executed import executed
from moe_merge_nb.study.measured import measured

def test_the_command_imports_nothing_heavy_before_its_kernels_run():
    code = ('import sys, moe_merge_nb.run.report, moe_merge_nb.run.kernels; '
            'print(*[m for m in ("torch", "pandas", "open_clip", "nbclient", "matplotlib") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

@pytest.fixture
def idle(monkeypatch):
    "Kernels that import nothing."
    monkeypatch.setattr(kernels, 'START', 'path = {path!r}; import time; time.sleep(60)')

def test_kernels_work_in_empty_folders_and_end_with_the_block(idle):
    with pytest.raises(KeyError), kernels.begun(2) as two:
        processes, folders = zip(*((k.provisioner.process, Path(k.provisioner.cwd)) for k in two))
        assert all(p.poll() is None for p in processes)
        assert len({*folders}) == 2 and not any(list(d.iterdir()) for d in folders)
        raise KeyError('anything')
    assert not any(k.has_kernel for k in two) and all(p.poll() is not None for p in processes)
    assert not any(d.exists() for d in folders)

def test_two_share_the_sections_and_the_page_keeps_their_order(monkeypatch):
    monkeypatch.setattr(kernels, 'START', kernels.START.replace('import moe_merge_nb.run.figures', 'pass'))
    cells = [new_code_cell('import os, time')]
    for i in range(4):
        cells += [new_code_cell(f'time.sleep({.5 - i/10})', metadata=dict(section=i))]
        cells += [new_code_cell(f'print({i}, os.getpid())', metadata=dict(section=i))]
    nb = new_notebook(cells=cells)
    with kernels.begun(2) as two:
        pids = {k.provisioner.process.pid for k in two}
        assert executed(nb, two, progress=False) == []
    said = [c.outputs[0].text.split() for c in nb.cells if c.source.startswith('print')]
    assert [i for i, _ in said] == ['0', '1', '2', '3'] and {int(pid) for _, pid in said} == pids
    assert [c.id for c in nb.cells] == [c.id for c in cells]

def test_there_are_none_where_nothing_can_execute_notebooks(idle, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nbclient', None)                              # as if not installed
    assert report.lacking() == ['nbclient'] and report.begin(None) == []

def test_what_is_stored_is_compared_with_once(tmp_path, monkeypatch, capsys):
    [run] = [r for r in measured('demo') if r.config['method'] == 'zero_shot']
    save_result(run, tmp_path/'run')
    asked = []
    monkeypatch.setattr(figures, 'measured', lambda name: asked.append(name) or measured(name))
    monkeypatch.setattr(figures, 'known_runs', lambda: asked.append('known') or measured('mini'))
    monkeypatch.setattr(figures, 'report', lambda paths, notebooks, *_, **__: (notebooks[1].stem, []))
    monkeypatch.setattr(report, 'begin', lambda stack: [])
    assert report.main([str(tmp_path), '--quiet']) == 0
    assert asked == ['known', 'main'] and 'report: one_run' in capsys.readouterr().out
