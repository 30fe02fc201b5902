"""The code is written as `tools/manners.py` wants it: every notebook, tool and test; and the tool finds what is not."""
import ast
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import manners
sys.path.pop(0)

FILES = [*manners.notebooks(), *manners.by_hand()]

@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_it_is_written_as_the_rules_want_it(path):
    said = manners.broken([path])
    assert not said, '\n'.join(said)


# ---- the rules themselves

CLEAN = '''
def area(
    width:float, # in pixels
    height:float,
)->float:
    "Of a rectangle."
    return width * height

def _helper(a, b): return a + b

class Box:
    "A rectangle that is kept."
    def __init__(self, sides):
        self.sides = sides

    def area(self)->float:
        "Of this one."
        return area(*self.sides)
'''
RULES = (manners.long_bodies, manners.untold, manners.untyped, manners.crowded)

def found(source):
    "What the rules say of it, all together."
    tree = ast.parse(source)
    return manners.long_lines(source, 'it') + [x for rule in RULES for x in rule(tree, 'it')]

def of_lines(n):
    "A function with a body of `n` lines besides its docstring."
    return 'def count()->int:\n    "Up."\n' + '    x = 1\n' * n

def test_clean_code_is_not_found_fault_with():
    assert found(CLEAN) == []

@pytest.mark.parametrize('n, says', [(120, []), (121, ['it: a line of 121 characters: ' + 'x' * 60])])
def test_a_line_may_have_120_characters(n, says):
    assert manners.long_lines('x' * n, 'it') == says

@pytest.mark.parametrize('n, says', [(1, []), (30, []), (31, ['it: count has a body of 31 lines'])])
def test_a_body_may_have_30_lines_and_its_docstring_is_not_counted(n, says):
    assert found(of_lines(n)) == says

def test_a_long_body_is_found_inside_a_function_and_in_a_method():
    inner = of_lines(31).replace('\n', '\n    ')
    assert [x for x in found(f'class Box:\n    {inner}') if 'body' in x] == ['it: count has a body of 31 lines']
    assert any('count has a body of 31 lines' in x for x in found(f'def outer()->None:\n    {inner}'))

@pytest.mark.parametrize('source, n', [
    ('#| export\n' + 'x = 1\n' * 25, 0),
    ('#| export\n' + 'x = 1\n\n' * 25 + '# a comment\n', 0),
    ('#| export\n' + 'x = 1\n' * 26, 1),
    ('#| export\n' + of_lines(28), 0),                                           # one thought: its body has a limit
    ('#| export\n' + 'import re\n' * 26, 0),
])
def test_an_exported_cell_has_25_lines_of_code_or_is_one_definition(source, n):
    assert len(manners.long_cells([source], 'it')) == n

@pytest.mark.parametrize('source, says', [
    ('def f(x): "Of x."', 'it: f has parameters without a type: x'),
    ('def f(\n    x:int,\n    *,\n    y,\n): "Of both."', 'it: f has parameters without a type: y'),
    ('class Box:\n    def put(self, x): "In."', 'it: Box.put has parameters without a type: x'),
])
def test_a_parameter_without_a_type_is_found(source, says):
    assert says in found(source)

@pytest.mark.parametrize('source, n', [
    ('def f(x:int, y:int): "Of both."', 1),
    ('def f(\n    x:int, y:int,\n): "Of both."', 1),
    ('def f(x:int): "Of one."', 0),
    ('def f(\n    x:int,\n    y:int,\n): "Of both."', 0),
])
def test_two_parameters_on_one_line_are_found(source, n):
    assert found(source) == ['it: f has two parameters on one line'] * n

def test_a_public_function_without_a_docstring_is_found_and_a_private_one_is_not():
    assert found('def f(): pass\ndef _f(): pass') == ['it: f has no docstring']
