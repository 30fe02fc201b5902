import nbformat, pytest, re
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pathlib import Path
from tempfile import TemporaryDirectory
from moe_merge_nb.run.page import *
from moe_merge_nb.run.figures import figure_notebooks, report
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result


def test_every_figure_notebook_takes_the_reports_runs_once():
    for p in figure_notebooks():
        cells = section(nbformat.read(p, as_version=4), with_stored=False)
        sources = [c.source for c in cells]
        assert sources.count('runs = given') == 1 and 'measured(' not in '\n'.join(sources), p
        assert cells[0].cell_type == 'markdown' and cells[0].source.startswith('## '), p
        assert not any('$' in c.source for c in cells if c.cell_type == 'markdown'), p
        assert not any('](' in c.source.replace('](#', '') for c in cells if c.cell_type == 'markdown'), p
