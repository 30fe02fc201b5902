"""The table of all systems: every line has a known state, and every page it names is there; recipes are in it."""
import json
import re
from pathlib import Path
import pytest
from moe_merge_nb.baselines.methods import SYSTEMS
from moe_merge_nb.variants.survey import TAGS

ROOT = Path(__file__).parents[1]
INDEX = ROOT/'nbs/8_rewrites/00_systems.ipynb'
STATES = 'faithful', 'adapted', 'idea', 'planned'
COLUMNS = 'number', 'system', 'paper', 'does', 'state', 'page', 'found'

def source(notebook):
    "All cells of a notebook as one text."
    return '\n'.join(''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'])

def line(text):
    "A line of the table by its columns."
    cells = [c.strip() for c in text.strip().strip('|').split('|')]
    assert len(cells) == len(COLUMNS), text
    return dict(zip(COLUMNS, cells))

ROWS = [line(text) for text in re.findall(r'^\| \d+ \|.*$', source(INDEX), re.M)]

def pages(row):
    "The notebooks that a line names."
    return [(INDEX.parent/target).resolve() for target in re.findall(r'\]\(([^)]+)\)', row['page'])]

def test_all_systems_are_there_once_and_in_order():
    assert [int(row['number']) for row in ROWS] == [*range(1, 23)]
    assert sorted(row['system'] for row in ROWS) == sorted(TAGS['system'])

@pytest.mark.parametrize('row', ROWS, ids=lambda row: row['system'])
def test_a_line_is_whole(row):
    assert row['state'] in STATES and re.fullmatch(r'\[(\d{4}\.\d{5})\]\(https://arxiv.org/abs/\1\)', row['paper'])
    if row['state'] == 'planned': assert not row['page'] and not row['found']
    else: assert pages(row) and row['found'].endswith('.')
    for page in pages(row): assert page.is_file(), f'{page} is not there'

def test_every_recipe_has_its_page_in_the_table():
    named = {page for row in ROWS for page in pages(row)}
    exports = {f'moe_merge_nb.{m}' for page in named for m in re.findall(r'^#\| default_exp (\S+)', source(page), re.M)}
    assert {where.rpartition('.')[0] for where in SYSTEMS.values()} <= exports

def test_every_state_is_explained():
    text = source(INDEX)
    for state in STATES: assert f'* *{state}* means' in text
