"""`python -m MODULE` does what the script of the same entry does. Everything is imported once; each program is a
forked process, so that a dozen cost little more than one."""
import importlib
import os
import runpy
import sys
import warnings
from configparser import ConfigParser
from pathlib import Path
import pytest
from hydra.core.plugins import Plugins

ROOT = Path(__file__).parents[1]
MODULES = {
    'moe_merge_nb': 'moe-merge',
    'moe_merge_nb.run.cli': 'moe-merge',
    'moe_merge_nb.run.report': 'moe-merge-report',
    'moe_merge_nb.run.predict': 'moe-merge-predict',
    'moe_merge_nb.run.released': 'moe-merge-convert',
    'moe_merge_nb.streams.prepare': 'moe-merge-data',
    'moe_merge_nb.cost.bench': 'moe-merge-bench',
    'moe_merge_nb.run.export': 'moe-merge-export',
    'moe_merge_nb.run.app': 'moe-merge-app'}
ARGUMENTS = {'moe-merge': ['--cfg', 'job']}  # Hydra's own --help takes five seconds; this is what it is made of


def program(how, what, arguments):
    "What a module or a script does in this process."
    sys.argv = ['program', *arguments]
    if how == 'module': return runpy.run_module(what, run_name='__main__', alter_sys=True)
    name, function = what.split(':')
    sys.exit(getattr(importlib.import_module(name), function)())

def answers(how, what, arguments):
    "The exit code of a module or a script, and what it prints; 77: it ended without an exit code, so it has not run."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(write, 1)
            sys.stdout = os.fdopen(1, 'w', closefd=False)
            warnings.simplefilter('ignore')
            program(how, what, arguments)
            code = 77
        except SystemExit as e: code = e.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as f: said = f.read()
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]

def scripts():
    "Script -> module:function, as they are installed."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(s.split('=') for s in ini['DEFAULT']['console_scripts'].split())


@pytest.fixture(scope='module', autouse=True)
def imported():
    "Everything, once."
    for name in MODULES:
        if name != 'moe_merge_nb': importlib.import_module(name)
    Plugins.instance()


def test_every_script_has_its_module():
    entries = scripts()
    assert set(entries) == set(MODULES.values())
    assert all(entries[script].startswith(f'{m}:') for m, script in MODULES.items() if m != 'moe_merge_nb')


@pytest.mark.parametrize('module', MODULES)
def test_a_module_prints_what_its_script_prints(module):
    script = MODULES[module]
    arguments = ARGUMENTS.get(script, ['--help'])
    code, said = answers('module', module, arguments)
    assert code == 0 and len(said.splitlines()) > 5
    assert [code, said] == answers('script', scripts()[script], arguments)
