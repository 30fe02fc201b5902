"""What the tool for the site makes of a page's Markdown."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]/'tools'))
from build_docs import FOLD, imports_folded

IMPORTS = '```python\nimport torch\n```'
CODE = '```python\nx = 1\n```'

def test_imports_are_folded_and_neighbours_are_one():
    text = imports_folded(f'{IMPORTS}\n\n\n{IMPORTS}\n\n{CODE}')
    assert text == f'{FOLD[0]}{IMPORTS}\n\n{IMPORTS}{FOLD[1]}\n\n{CODE}'

def test_whatever_does_more_than_import_stays_open():
    for code in ('python\nimport torch\nx = 1', 'python\n%time import torch', '\nimport this'):
        block = f'```{code}\n```'
        assert imports_folded(block) == block
