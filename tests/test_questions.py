"""What a command asks is answered from a file that is made of the dataclasses, without loading what works: every
setting with its value and a line on what it is. And the names of directories, and arguments that are text."""
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from moe_merge_nb.run import told
from moe_merge_nb.run.line import as_text, as_texts, besides, piece, run_name

FIRST = '''
import io, json, os, sys
from contextlib import redirect_stdout
from moe_merge_nb.run import cli
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ['moe-merge', *arguments]
    with redirect_stdout(io.StringIO()) as out: cli.main()
    said.append(out.getvalue())
loaded = [m for m in ('torch', 'open_clip', 'pandas', 'accelerate') if m in sys.modules]
print(json.dumps(dict(said=said, loaded=loaded)))
'''
ASKED = [
    ['--help'], ['--cfg', 'job', '--resolve', 'method=moe'], ['--version'], ['-sc', 'query=bash'], ['--cfg', 'hydra']]


@pytest.fixture(scope='module')
def answers():
    "What one process answers to all questions, and what it loaded."
    env = {**os.environ, 'COMP_LINE': 'moe-merge train.lr', 'COMP_POINT': '18'}
    start = [sys.executable, '-c', FIRST, json.dumps(ASKED)]
    return json.loads(subprocess.run(start, env=env, capture_output=True, text=True, check=True).stdout)

def test_a_question_loads_nothing_that_works(answers):
    assert answers['loaded'] == []
    assert all(answers['said'])

def test_help_shows_every_setting_its_value_and_what_it_is(answers):
    rows = [line.split(maxsplit=2) for line in answers['said'][0].splitlines() if line.startswith('  ')]
    shown = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert shown['train.lr'] == ['0.01', 'peak learning rate; a dict: by name of the task']
    assert shown['train.iterations'][0] == '150' and shown['experts.rank'][0] == '16'
    assert shown['experts.n_experts'] == ['22', 'E, experts per block; 0: no mixtures, just the model']
    assert 'usage_weighted' in shown['merge.combine'][1] and '${' not in answers['said'][0]

def test_the_configuration_is_a_file_with_a_comment_for_every_setting(answers):
    found = yaml.safe_load(answers['said'][1])
    assert found['train']['iterations'] == 150 and found['experts']['rank'] == 16 and found['merge'] is None
    assert found['train']['betas'] == [.9, .999] and found['train']['warmup'] is None
    lines = [line for line in answers['said'][1].splitlines() if '_target_' not in line and not line.endswith(':')]
    assert [line for line in lines if '  # ' not in line] == []

def test_version_and_completion_are_the_packages(answers):
    from importlib.metadata import version
    assert answers['said'][2] == f'moe-merge {version("moe_merge_nb")}\n'
    assert answers['said'][3].split() == ['train.lr=']

def test_the_stored_answers_are_those_of_the_dataclasses():
    from moe_merge_nb.run.explain import collected
    assert collected() == json.loads(told.STORED.read_text(encoding='utf-8')), 'run python -m moe_merge_nb.run.explain'

@pytest.mark.parametrize('line', [
    'method=zscl stream=mtil shots=5', 'method=rail stream=folder root=x model=vitb16', 'method=moe_warm stream=toy',
    'method=icarl train.lr=.5', 'change=once'])
def test_what_is_shown_is_what_would_run(line):
    from omegaconf import OmegaConf
    from moe_merge_nb.run.options import composed
    shown = OmegaConf.to_container(told.settings_of(line.split()), resolve=True)
    assert shown == json.loads(json.dumps(OmegaConf.to_container(composed(*line.split()), resolve=True)))

def test_a_choice_of_ones_own_is_shown_too(tmp_path, monkeypatch):
    (tmp_path/'my_streams.py').write_text('def two(data_seed=7): "A stream"\n')
    monkeypatch.syspath_prepend(tmp_path)
    with redirect_stdout(StringIO()) as out: told.tell(['--cfg', 'job', 'stream=my_streams.two'])
    assert yaml.safe_load(out.getvalue())['stream'] == dict(_target_='my_streams.two', data_seed=0)


# ---- names of directories

def test_a_directory_is_named_after_the_arguments_without_what_shells_and_hydra_read():
    name = run_name(['seed=0', 'method=moe', 'threads=2', 'merge.every=20'])
    assert name == 'merge.every-20+method-moe+seed-0'
    odd = run_name(['selectors=[oracle,gaussian]', 'root=/data/my images [2020]', 'train.lr=1e-3'])
    assert odd.startswith('root-my_images_2020-') and not set(odd) & set('=,[]()\'" /')
    OverridesParser.create().parse_override(f'from=runs/moe_merge/{odd}')            # an error if Hydra cannot read it

@pytest.mark.parametrize('key', ['root', 'stream.lists', 'model.pretrained', 'order', 'name', 'data_seed'])
def test_every_value_of_what_decides_numbers_has_a_directory_of_its_own(key):
    values = ['A', 'C', 'a/A', 'b/A', '/A', 'A ', '[A]', 'A,C', 'a' * 300, 'a' * 299 + 'b', '猫', '犬', '..', '../A', '.']
    names = [run_name([f'{key}={v}', 'seed=0']) for v in values]
    assert len(set(names)) == len(values)
    assert all(len(n.encode()) <= 150 and '/' not in n for n in names)

def test_long_names_are_cut_in_bytes_and_stay_apart():
    a, b = ([f'{word}=猫犬鳥魚馬牛' for word in map(str, range(30))] + [last] for last in ('x=1', 'x=2'))
    assert run_name(a) != run_name(b) and len(run_name(a).encode()) == 150

def test_no_name_leaves_its_folder():
    assert '/' not in piece('../../../../x') and piece('../../../../x').startswith('x-')
    assert piece('..')[0] != '.' and piece('.hidden')[0] != '.' and piece('moe_merge') == 'moe_merge'

def test_a_named_sweep_has_a_directory_for_everything_that_is_given_besides():
    options = told.stored()['groups']['experiment']['main']
    inside = ['method=moe', 'selectors=[oracle,gaussian]', 'classes=[task,all]', 'order=1', 'data_seed=100', 'seed=100']
    assert besides(options, ['experiment=main', *inside]) == ''
    assert besides(options, [*inside, 'merge.every=20']) == '+merge.every-20'
    assert besides(options, ['selectors=[oracle]', 'order=2']).startswith('+selectors-oracle-')


# ---- arguments that are text

def read(argument, sweep=False):
    "What Hydra makes of it."
    found = OverridesParser.create().parse_override(as_text(argument, sweep)).value()
    return found.value if hasattr(found, 'value') else found

ODD = ['runs/moe/seed=0', 'my images [2020]', "it's", '2020', 'a,b', '[x]', 'null/x', 'a\\b\\', 'q(1)']

@pytest.mark.parametrize('path', ODD)
def test_a_path_is_text_whatever_is_in_it(path):
    for key in ('from', 'root', 'model.pretrained'): assert read(f'{key}={path}') == path

def test_names_of_tasks_are_text_and_what_hydra_cannot_read_is_too():
    assert read('order=[2020,MNIST, true]') == ['2020', 'MNIST', 'true'] and read('order=1') == 1
    assert read('merge.combine=f(x') == 'f(x' and read('root=null') is None and read('seed=3') == 3
    swept = as_texts(['-m', 'root=A[b],C', 'order=[a,b],[b,a]'])
    assert swept == ['-m', "root='A[b]','C'", "order=['a','b'],['b','a']"]

def test_an_unknown_setting_is_named():
    with pytest.raises(HydraException, match='ranks'): told.settings_of(['experts.ranks=8'])
