"""The page of promises names tests and pages that exist, and a promise for every kind."""
import json
import re
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT/'nbs'/'safe'/'12_reliability.ipynb'
CELLS = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
TEXT = '\n'.join(''.join(c['source']) for c in CELLS if c['cell_type'] == 'markdown')
ROWS = [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in TEXT.splitlines() if line.startswith('| ')]

@pytest.mark.parametrize('kind', ['identity', 'label spaces', 'names', 'encodings', 'links', 'caches'])
def test_every_kind_has_a_promise_a_page_and_a_test(kind):
    [(_, promise, pages, tests)] = [row for row in ROWS if row[0] == kind]
    assert len(promise) > 40 and '.ipynb' in pages and 'test_' in tests

def test_every_test_that_is_named_exists():
    named = set(re.findall(r'`(?:tests/)?(test_\w+)', TEXT))
    assert len(named) > 20 and [n for n in named if not (ROOT/'tests'/f'{n}.py').is_file()] == []

def test_every_page_that_is_named_exists():
    links = re.findall(r'\]\(([\w./]+\.ipynb)\)', TEXT)
    assert [link for link in links if not (PAGE.parent/link).is_file()] == []

def test_it_is_said_what_the_same_means_on_another_processor():
    assert 'with and without AVX-512' in TEXT and 'the weights of the adapters were not' in TEXT
