"""What the README says works as it is written: its links and those of every page lead somewhere, its commands run, and
what cheap pages show is what they would show now.

Commands are called in this process with the words of the README; smaller sizes are added behind them."""
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
import pytest
from execnb.nbio import read_nb
from fastcore.xtras import working_directory
from moe_merge_nb.run import cli, figures, report
from moe_merge_nb.run.job import method_of
from moe_merge_nb.run.options import composed
from moe_merge_nb.streams import prepare
from toys import forked


ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text(encoding='utf-8')
NBS = sorted(p for p in (ROOT/'nbs').rglob('[!_]*.ipynb') if '.ipynb_checkpoints' not in p.parts)


# ---- links

LINK = re.compile(r'\]\((?!https?:|mailto:)([^)\s]+)\)')

def words_of(cell):
    "What a cell says to a reader: its text, or what it showed as text."
    if cell['cell_type'] == 'markdown': return [''.join(cell['source'])]
    shown = [o.get('data', {}).get('text/markdown', '') for o in cell.get('outputs', [])]
    return [''.join(text) for text in shown]

def text_of(path):
    "All that a file says to a reader."
    if path.suffix != '.ipynb': return path.read_text(encoding='utf-8')
    return '\n'.join(w for c in json.loads(path.read_text(encoding='utf-8'))['cells'] for w in words_of(c))

def anchors(path):
    "The headings of a page, as links name them."
    heads = re.findall(r'^#+\s+(.+)$', text_of(path), re.M)
    return {re.sub(r'[^\w\- ]', '', h.strip().lower()).replace(' ', '-') for h in heads}

def dead(path):
    "Links that lead nowhere."
    found = []
    for link in LINK.findall(text_of(path)):
        if link.startswith('javascript:'): continue                                 # shown as text
        file, _, anchor = link.partition('#')
        target = path.parent/file if file else path
        if not target.exists() or anchor and anchor.lower() not in anchors(target): found.append(link)
    return found

@pytest.mark.parametrize('path', ['README.md', 'CONTRIBUTING.md', *(str(p.relative_to(ROOT)) for p in NBS)])
def test_every_link_leads_somewhere(path):
    assert dead(ROOT/path) == []

def test_a_dead_link_is_seen(tmp_path):
    (tmp_path/'a.md').write_text('[a](b.md) [b](#no) [c](#a-head) [d](a.md#a-head)\n# A `head`!')
    assert dead(tmp_path/'a.md') == ['b.md', '#no']


# ---- commands

def commands():
    "Every line of the README's shell blocks, without its comment."
    blocks = re.findall(r'^```sh\n(.*?)^```', README, re.M | re.S)
    return [re.split(r'\s{2,}#', line)[0].strip() for b in blocks for line in b.splitlines() if line.strip()]

LINES = commands()
SMALL = ['stream=toy', 'stream.n_tasks=1', 'model=toy', 'train.batch=4', 'experts.n_experts=4', 'experts.rank=2',
         'selectors=[oracle]']
HERE = {  # the beginning of a line -> what is added to it
    'moe-merge merge.combine=my_rules': [*SMALL, 'train.iterations=4'],
    'moe-merge -m': [*SMALL, 'train.iterations=40', 'merge.until=1', 'hydra.launcher.n_jobs=1'],
    'moe-merge seed=0': [],
    'moe-merge rewrite=': [],
    'moe-merge extend=': []}
TOOLS = 'moe-merge-data pictures', 'moe-merge-predict', 'moe-merge-app', 'moe-merge-export'
NEEDS_DOWNLOAD = ('model=vitb16', 'moe-merge-data prepare', 'moe-merge-convert')

def test_every_line_is_run_here_or_needs_a_download():
    assert len(LINES) > 10
    for line in LINES:
        known = line.startswith(('make ', 'moe-merge-report', 'moe-merge-data status', *TOOLS, *HERE))
        assert known or any(x in line for x in NEEDS_DOWNLOAD), line

def typed(monkeypatch, line, more=()):
    "The line, with small sizes added."
    monkeypatch.setattr(sys, 'argv', [*shlex.split(line), *more])
    try: cli.main()
    except SystemExit as e: assert e.code in (None, 0), e.code

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A working directory with the README's own rule."
    d = tmp_path_factory.mktemp('here')
    [rule] = [b for b in re.findall(r'^```python\n(.*?)^```', README, re.M | re.S) if 'def task_arithmetic' in b]
    (d/'my_rules.py').write_text(rule)
    return d

@pytest.fixture
def inside(here, monkeypatch):
    "That directory, as a user has it."
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    return here

def lines(start):
    "The lines that begin so."
    found = [line for line in LINES if line.startswith(start)]
    assert found, start
    return found

def test_the_rule_of_the_readme_trains_and_its_sweep_runs(inside, monkeypatch, capsys):
    for line in lines('moe-merge merge.combine'): typed(monkeypatch, line, HERE['moe-merge merge.combine=my_rules'])
    before = set(Path('runs').rglob('config.json'))
    with forked():
        for line in lines('moe-merge -m'): typed(monkeypatch, line, HERE['moe-merge -m'])
    found = [json.loads(p.read_text()) for p in set(Path('runs').rglob('config.json')) - before]
    assert sorted((c['method'], c['seed'], (c['merge'] or {}).get('every')) for c in found) == sorted(
        [('moe', s, None) for s in range(3)] + [('moe_merge', s, e) for s in range(3) for e in (20, 40)])

def test_a_run_is_where_the_readme_says_and_is_rewritten(inside, monkeypatch, capsys):
    few = [*SMALL, 'stream.n_tasks=1', 'experts.n_experts=12', 'train.iterations=4']
    few.remove('experts.n_experts=4')
    [line] = lines('moe-merge seed=0')
    [rewriting] = lines('moe-merge rewrite=')
    where = re.search(r'from=(\S+)', rewriting)[1]
    from moe_merge_nb.run.line import run_name
    assert where == f'runs/moe_merge/{run_name(shlex.split(line)[1:])}'
    typed(monkeypatch, line, [*few, f'hydra.run.dir={where}'])
    typed(monkeypatch, rewriting.replace('recover=55', 'recover=2'))
    assert (Path(where)/'rewrites'/'submoe-11-recovered2'/'accuracy.csv').is_file()
    assert not set(where) & set('=,[]()\' ')

def test_the_report_and_the_status_are_asked_for_as_the_readme_does(inside, monkeypatch, capsys):
    monkeypatch.setattr(report, 'begin', lambda stack: [])
    monkeypatch.setattr(figures, 'report', lambda *args, **how: (Path('report.html'), []))
    for line in lines('moe-merge-report'): assert report.main(shlex.split(line)[1:]) == 0
    for line in lines('moe-merge-data status'): assert prepare.main(shlex.split(line)[1:]) in (0, 1)
    assert 'StanfordCars' in capsys.readouterr().out

@pytest.fixture
def trained(inside, monkeypatch):
    "A small run where the README's demo has one, and a folder of one more task."
    from PIL import Image
    [line] = lines('moe-merge-predict')
    where = Path(shlex.split(line)[1])
    few = [*SMALL[:-1], 'stream.n_tasks=2', 'experts.n_experts=12', 'selectors=[oracle,gaussian]']
    few = [f for f in few if f not in ('stream.n_tasks=1', 'experts.n_experts=4')]
    if not where.exists(): typed(monkeypatch, 'moe-merge', [*few, 'train.iterations=4', f'hydra.run.dir={where}'])
    for name, colour, split in itertools.product(('red', 'blue'), range(4), ('train', 'test')):
        path = inside/'my_images'/'Colours'/split/name/f'{colour}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 40), (name == 'red' and 150 + colour, 0, name == 'blue' and 150 + colour)).save(path)
    return where

def test_pictures_are_classified_and_a_task_is_added_as_the_readme_does(trained, monkeypatch, capsys):
    from moe_merge_nb.run import predict
    [drawing], [asking] = lines('moe-merge-data pictures'), lines('moe-merge-predict')
    [adding] = lines('moe-merge extend')
    assert not prepare.main(shlex.split(drawing)[1:]) and len(list(Path('pictures').glob('*.png'))) == 5
    assert predict.main(shlex.split(asking)[1:]) == 0
    assert all(p.name in capsys.readouterr().out for p in list(Path('pictures').glob('*.png'))[:1])
    typed(monkeypatch, adding)
    [config] = Path('runs/extended').rglob('config.json')
    assert json.loads(config.read_text())['tasks'][2:] == ['Colours']
    assert predict.main([str(config.parent), 'my_images/Colours/test/red/0.png', '--task', 'Colours']) == 0

def test_the_tools_of_extras_take_what_the_readme_says():
    from moe_merge_nb.run import app, export
    for start, tool in (('moe-merge-app', app), ('moe-merge-export', export)):
        [line] = lines(start)
        assert tool.parser().parse_args(shlex.split(line)[1:]).run == 'runs/demo/moe_merge-seed0'

def test_lines_that_need_a_download_mean_what_there_is():
    for line in LINES:
        if 'model=vitb16' not in line: continue
        words = shlex.split(line.replace('$(which moe-merge)', 'moe-merge'))
        arguments = words[words.index('moe-merge') + 1:]
        assert method_of(composed(*arguments)).name == 'moe_merge'

def test_make_has_what_is_named():
    targets = re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M)
    assert {re.split(r'\s', line)[1] for line in lines('make ')} <= set(targets)


# ---- outputs

PAGES = [
    '1_streams/14_order', '3_layer/04_kinds', '4_merge/01_usage', '6_learn/01_settings', '6_learn/06_method',
    '6_learn/10_metrics', '7_baselines/06_methods', '8_rewrites/12_rules', 'run/01_config', 'run/02_options',
    'run/04_line', 'run/05_told', 'run/07_jobs', 'safe/07_settings']

def said(cell):
    "What a cell showed as text, with its numbers apart."
    text = ''
    for o in cell.get('outputs', []):
        if o.get('name') == 'stderr': continue
        shown = o.get('text') or o.get('data', {}).get('text/plain', '')
        if 'image/png' not in o.get('data', {}): text += re.sub(' at 0x[0-9a-f]+', '', ''.join(shown))
    number = re.compile(r'-?\d+\.?\d*(?:e-?\d+)?')
    return number.sub('#', re.sub(r'\s+', ' ', text)).strip(), [float(n) for n in number.findall(text)]

@pytest.mark.parametrize('page', PAGES)
def test_a_page_shows_what_it_would_show_now(page, monkeypatch):
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    from save_outputs import is_left_out
    path, skip = ROOT/'nbs'/f'{page}.ipynb', set(get_config().tst_flags.split())
    stored, nb = read_nb(path), NBProcessor(path, rm_directives=False, process=True).nb
    left_out = lambda cell: is_left_out(cell, skip)
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=left_out)
    for before, now in zip(stored.cells, nb.cells):
        if now.cell_type != 'code' or left_out(now): continue
        (words, numbers), (new_words, new_numbers) = said(before), said(now)
        assert words == new_words, before.source
        assert new_numbers == pytest.approx(numbers, rel=.02, abs=1e-6), before.source

def test_no_page_says_that_a_run_goes_on_between_tasks_only():
    pages = [p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    said = [p.name for p in pages if 'after the last finished task' in p.read_text(encoding='utf-8')]
    assert len(pages) > 150 and not said
