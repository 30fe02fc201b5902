"""The chapters come one after the other: a sub-package imports only from those before it, and the pages are numbered.

`ORDER` is the only place where their order is written down."""
import ast
import json
import re
from pathlib import Path
import pytest

ORDER = [
    'safe',
    'streams',
    'clip',
    'layer',
    'merge',
    'select',
    'learn',
    'baselines',
    'rewrites',
    'variants',
    'strategies',
    'sharded',
    'study',
    'run',
    'cost',
]
ROOT = Path(__file__).parents[1]
PACKAGE = 'moe_merge_nb'
MODULES = sorted(p for p in (ROOT/PACKAGE).glob('*/*.py') if p.name != '__init__.py')
NBS = sorted(p for p in (ROOT/'nbs').rglob('[!_]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
FOLDERS = sorted({p.parent for p in NBS if p.parent != ROOT/'nbs'})
PAGE = re.compile(r'(\d\d)_(\w+)')
EXPORTS = re.compile(r'^#\|\s*default_exp (\S+)', re.M)

name_of = lambda path: str(path.relative_to(ROOT))


# ---- imports

def absolute(
    node:ast.ImportFrom,
    package:tuple[str, ...], # of the module that imports
)->list[tuple[str, ...]]:
    "What `from ... import ...` names, from the root: one for each name."
    base = package[:len(package) - node.level + 1] if node.level else ()
    base += tuple(node.module.split('.')) if node.module else ()
    return [(*base, a.name) for a in node.names]

def imported(
    source:str,
    package:tuple[str, ...], # of the module that imports: ('moe_merge_nb', 'learn')
)->set[str]:
    "The parts of the package that a module imports from, also inside functions."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [tuple(a.name.split('.')) for a in node.names]
        if isinstance(node, ast.ImportFrom): found += absolute(node, package)
    return {path[1] for path in found if path[0] == PACKAGE and len(path) > 1}

def too_early(
    source:str,
    chapter:str, # that the module belongs to
)->list[str]:
    "The parts it imports from that do not stand before it."
    before = ORDER[:ORDER.index(chapter) + 1]
    return sorted(imported(source, (PACKAGE, chapter)) - set(before))

def test_every_sub_package_has_its_place():
    assert {p.parent.name for p in MODULES} <= set(ORDER)

@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_a_module_imports_from_earlier_sub_packages_only(path):
    assert too_early(path.read_text(encoding='utf-8'), path.parent.name) == []

@pytest.mark.parametrize('line, later', [
    ('from ..safe.files import replacing', []),
    ('from .train import train_task', []),
    ('from . import train', []),
    ('import torch.cost', []),
    ('from moe_merge_nb.clip import encode', []),
    ('import moe_merge_nb', []),
    ('from ..run.config import method', ['run']),
    ('from .. import run', ['run']),
    ('import moe_merge_nb.cost.bench', ['cost']),
    ('from moe_merge_nb import rewrites, safe', ['rewrites']),
    ('from moe_merge_nb.all import *', ['all']),
    ('def f():\n    from ..study.plots import plot\n    return plot', ['study']),
])
def test_an_import_from_a_later_one_is_seen_however_it_is_written(line, later):
    assert too_early(line, 'learn') == later


# ---- pages

def exported(notebook):
    "What a notebook exports, or None."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    for c in cells:
        found = EXPORTS.search(''.join(c['source'])) if c['cell_type'] == 'code' else None
        if found: return found[1]
    return None

@pytest.mark.parametrize('folder', FOLDERS, ids=name_of)
def test_no_two_notebooks_of_a_chapter_have_the_same_number(folder):
    pages = [PAGE.fullmatch(p.stem) for p in NBS if p.parent == folder]
    numbers = [m[1] for m in pages if m]
    assert len(set(numbers)) == len(numbers), sorted(n for n in numbers if numbers.count(n) > 1)

@pytest.mark.parametrize('nb', [p for p in NBS if PAGE.fullmatch(p.stem)], ids=name_of)
def test_a_notebook_exports_the_module_of_its_name_or_nothing(nb):
    chapter = nb.parent.name.lstrip('0123456789').lstrip('_')
    assert exported(nb) in (None, f'{chapter}.{PAGE.fullmatch(nb.stem)[2]}')
