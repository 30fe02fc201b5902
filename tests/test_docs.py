"""What the tool for the site makes of a page's Markdown."""
import sys
from pathlib import Path
import nbformat
import pytest
from nbdev.doclinks import nbglob

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from build_docs import FOLD, FORMULA, converted, imports_folded

IMPORTS = '```python\nimport torch\n```'
CODE = '```python\nx = 1\n```'

def test_imports_are_folded_and_neighbours_are_one():
    text = imports_folded(f'{IMPORTS}\n\n\n{IMPORTS}\n\n{CODE}')
    assert text == f'{FOLD[0]}{IMPORTS}\n\n{IMPORTS}{FOLD[1]}\n\n{CODE}'

def test_whatever_does_more_than_import_stays_open():
    for code in ('python\nimport torch\nx = 1', 'python\n%time import torch', '\nimport this'):
        block = f'```{code}\n```'
        assert imports_folded(block) == block

def test_a_command_that_the_converter_does_not_know_is_no_text_on_the_page():
    assert '&#x02016;' in converted(r'\Big\| x \Big\|')
    with pytest.raises(ValueError, match='left over'): converted(r'\nosuch x')

def test_every_formula_of_the_pages_can_be_shown():
    cells = [c for p in nbglob(as_path=True) for c in nbformat.read(p, 4).cells if c.cell_type == 'markdown']
    formulas = [m[2] or m[3] for c in cells for m in FORMULA.finditer(c.source) if not m[1]]
    assert len(formulas) > 300
    for formula in formulas: converted(formula.strip())
