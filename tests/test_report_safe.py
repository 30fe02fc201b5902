"""A report can be made of somebody else's runs, and opened: whatever these are called, no code of theirs runs, and
nothing of theirs is markup. One whole report is made, by an ASCII terminal, in a folder full of traps."""
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
import mistune
import nbformat.v4 as v4
import pandas as pd
import pytest
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run.page import page
from moe_merge_nb.run.figures import NOTEBOOKS
from moe_merge_nb.safe.shown import plain_markdown, visible
from moe_merge_nb.study.words import Said, frame_html

RUN = 'document.body.dataset.attacked=1'
ATTACKS = [
    f'x<script>{RUN}</script>',
    f'<img src=x onerror={RUN}>',
    f'[x](javascript:{RUN})',
    f'"><svg/onload={RUN}>',
    f"' onmouseover='{RUN}",
    f'" autofocus onfocus="{RUN}" x="',
    '</td></tr></table></div><h1>attacked</h1>',
    '**attacked** _attacked_ `attacked`',
    '![attacked](http://attacked.test/i.png)',
    f'<a href="javascript:{RUN}">x</a>',
    f'$\\href{{javascript:{RUN}}}{{x}}$ $\\frac$',
    f'$$x$$ \\(x\\) \\begin{{x}}<b>{RUN}</b>\\end{{x}}',
    f'<iframe srcdoc="<script>{RUN}</script>"></iframe>',
    '<style>*{display:none}</style><link rel=stylesheet href=http://attacked.test>',
    '</title><meta http-equiv=refresh content="0;url=http://attacked.test">',
    '<!-- --><base href=http://attacked.test><form><button formaction=javascript:1>',
    f'x\n\n# attacked\n\n<details open ontoggle={RUN}>\n\n|a|b|\n|-|-|\n',
    '${title} $body {{ cell }} {% raw %} &lt;script&gt; \\g<0> \x1b[31m',
]

class Structure(HTMLParser):
    "Every element with its attributes, and the text between them."
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.elements.append((tag, *attrs))
    def handle_data(self, data): self.text += data
    def handle_comment(self, data): self.elements.append(('comment', data))

@cache
def shown_with(name):
    "A page with this name in every kind of output."
    table = pd.DataFrame({name: [name, 'x']}, pd.MultiIndex.from_tuples([(name, name), ('a', 'b')], names=[name, 'n']))
    data = [{'text/html': Said(name, f'{name} is best', strong=True)._repr_html_()},
            {'text/html': frame_html(table.rename_axis(columns=name))},
            {'text/markdown': f'**{name}**', 'text/plain': 'x'},
            {'text/plain': name},
            {'image/svg+xml': f'<svg>{name}</svg>', 'application/javascript': name, 'text/plain': 'x'}]
    outputs = [v4.new_output('display_data', d) for d in data]
    outputs += [v4.new_output('error', ename=name, evalue=name, traceback=[f'ValueError: {name}'])]
    outputs += [v4.new_output('stream', name=n, text=name) for n in ('stdout', 'stderr')]
    r = example_result(name)
    r.config |= dict(stream=name, machine=name, commit=name)
    cells = [v4.new_markdown_cell('## A section', id='a'), v4.new_code_cell('x', outputs=outputs, id='b')]
    return page(v4.new_notebook(cells=cells), [r])

@pytest.mark.parametrize('name', ATTACKS)
def test_no_element_and_no_attribute_comes_from_a_name(name):
    found, plain = Structure(shown_with(name)), Structure(shown_with('plain'))
    assert found.elements == plain.elements
    assert visible(name) in found.text.replace('\xa0', ' ')

@pytest.mark.parametrize('name', ATTACKS)
def test_a_name_in_the_card_of_shared_adapters_is_text(name):
    def card(n): return Structure(mistune.html(f'| | |\n|---|---|\n| tasks | {plain_markdown(n)} |\n'))
    cards = card(name), card('moe_merge')
    assert cards[0].elements == cards[1].elements and ' '.join(visible(name).split()) in cards[0].text


# ---- a whole report

TRAP = "import pathlib\npathlib.Path({!r}).write_text('run')\n"
TRAPS = 'ipykernel_launcher ipykernel matplotlib pandas IPython nbformat sitecustomize seaborn html'.split()
ASCII = dict(LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

def attacking(method, seed):
    "An invented run whose names are attacks."
    r = example_result(method, seed, n_tasks=2)
    if method != 'moe': r.config['method'] = f'{method} {ATTACKS[0]} {ATTACKS[10]}'
    new = {'Aircraft': ATTACKS[1] + ATTACKS[2], 'Caltech': ATTACKS[3] + ATTACKS[6], 'gaussian': ATTACKS[9] + ATTACKS[7]}
    for name in ('matrix', 'selection', 'usage', 'fixed'):
        table = getattr(r, name)
        for c in table.columns.intersection(['after', 'task', 'selected', 'selector']): table[c] = table[c].replace(new)
    r.events = [{**e, 'task': new[e['task']]} for e in r.events]
    r.config |= dict(tasks=[new[t] for t in r.config['tasks']], stream=ATTACKS[12], machine=ATTACKS[14])
    r.config |= dict(config_hash=f'{method}{seed}', seconds=seed + 1.5)
    return r

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "What the command did with these runs: exit code and outputs, the folder."
    d = tmp_path_factory.mktemp('report')
    for m, s in product(('moe', 'moe_merge'), (0, 1)): save_result(attacking(m, s), d/'runs'/f'{m}{s}')
    plain = attacking('finetune', 0)
    plain.events, plain.usage, plain.fixed = [], plain.usage[:0], plain.fixed[:0]
    save_result(plain, d/'runs'/'finetune')
    for name in TRAPS: (d/f'{name}.py').write_text(TRAP.format(str(d/'trapped')))
    (d/'basic').mkdir()
    (d/'basic'/'conf.json').write_text('{"base_template": null}')
    (d/'basic'/'index.html.j2').write_text('<script>attacked</script>')
    (d/'matplotlibrc').write_text('figure.dpi: not a number\nsavefig.facecolor: attacked\n')
    command = [str(Path(sys.executable).with_name('moe-merge-report')), 'runs', '--quiet']
    one = dict(LOKY_MAX_CPU_COUNT='1')                                      # kernel: `test_kernels` has two
    done = subprocess.run(command, cwd=d, env={**os.environ, **ASCII, **one}, capture_output=True, timeout=500)
    return done, d

def test_a_terminal_that_knows_ascii_only_gets_table_and_page(made):
    done, d = made
    assert done.returncode == 0, done.stderr.decode()
    assert b'mean +- standard error in %' in done.stdout and b'\x1b' not in done.stdout
    assert done.stdout.isascii() and b'report: runs/report.html' in done.stdout
    assert '±' in (d/'runs'/'report.html').read_text(encoding='utf-8')

def test_nothing_that_lies_in_the_working_directory_is_run(made):
    assert not (made[1]/'trapped').exists()

def test_a_page_of_attacks_is_a_page_of_text(made):
    found = Structure((made[1]/'runs'/'report.html').read_text(encoding='utf-8'))
    tags = [tag for tag, *_ in found.elements]
    assert not {'script', 'svg', 'iframe', 'link', 'base', 'form', 'b', 'details', 'comment'} & set(tags)
    assert tags.count('h1') == tags.count('title') == tags.count('style') == 1 and tags.count('meta') == 3
    assert tags.count('h2') == len(NOTEBOOKS)
    links = [dict(a)['href'] for tag, *a in found.elements if tag == 'a']
    assert links and all(re.fullmatch(r'#section[1-5]', link) for link in links)
    images = [dict(a)['src'] for tag, *a in found.elements if tag == 'img']
    assert len(images) >= 6 and all(i.startswith('data:image/png;base64,') for i in images)
    assert 'ttacked' not in str(found.elements) and 'javascript' not in str(found.elements)
    assert f'highest Last is that of moe_merge {ATTACKS[0]}' in found.text or ATTACKS[1] in found.text

def test_a_page_says_nothing_of_what_is_not_known_and_counts_in_english(made):
    text = (made[1]/'runs'/'report.html').read_text(encoding='utf-8')
    words = Structure(text).text
    assert 'NaN' not in words and '<tbody>\n  </tbody>' not in text and 'Traceback' not in text
    assert not re.search(r'\b1 (cells|seeds|runs|merges|tasks|pairs|data seeds)\b', words)
    assert 'come with the package' not in words and 'published' not in words.lower()

@pytest.mark.skipif(not shutil.which('chromium'), reason='no browser')
def test_a_browser_runs_nothing_even_without_the_policy(made, tmp_path):
    text = (made[1]/'runs'/'report.html').read_text(encoding='utf-8') + ''.join(map(shown_with, ATTACKS))
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', '', text)
    (tmp_path/'page.html').write_text(text, encoding='utf-8')
    browser = 'chromium --headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --dump-dom'.split()
    def dom(page):
        (tmp_path/'page.html').write_text(page, encoding='utf-8')
        command = [*browser, f'--user-data-dir={tmp_path}', f'file://{tmp_path}/page.html']
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert 'data-attacked="1"' in dom(f'<body>{ATTACKS[0]}</body>')                     # it would be seen
    found = dom(text)
    assert '<h2 id="section1">' in found and 'data-attacked="1"' not in found
