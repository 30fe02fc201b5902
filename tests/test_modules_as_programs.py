"""`python -m MODULE` does what the script of the same entry does. One process imports everything once; each program is
a child of it, so that a dozen cost little more than one."""
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
import pytest

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

SERVER = '''
import importlib, json, os, runpy, sys
from hydra.core.plugins import Plugins
for name in json.loads(sys.argv[1]): importlib.import_module(name)
Plugins.instance()

def program(how, what, arguments):
    sys.argv = ['program', *arguments]
    if how == 'module': return runpy.run_module(what, run_name='__main__', alter_sys=True)
    name, function = what.split(':')
    sys.exit(getattr(importlib.import_module(name), function)())

for line in sys.stdin:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write, 1)
        code = None
        try: program(*json.loads(line))
        except SystemExit as e: code = e.code or 0
        sys.stdout.flush()
        os._exit(77 if code is None else code)
    os.close(write)
    with os.fdopen(read) as f: said = f.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, said]), flush=True)
'''
# 77: it ended without an exit code, that is, without having run


def scripts():
    "Script -> module:function, as they are installed."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return dict(s.split('=') for s in ini['DEFAULT']['console_scripts'].split())


@pytest.fixture(scope='module')
def answers():
    "Answers with the exit code of a module or a script, and what it prints."
    names = [m for m in MODULES if m != 'moe_merge_nb']
    start = [sys.executable, '-W', 'ignore', '-c', SERVER, json.dumps(names)]
    s = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def ask(how, what, arguments):
        s.stdin.write(json.dumps([how, what, arguments]) + '\n')
        s.stdin.flush()
        return json.loads(s.stdout.readline())
    yield ask
    s.stdin.close()
    s.wait(60)


def test_every_script_has_its_module():
    entries = scripts()
    assert set(entries) == set(MODULES.values())
    assert all(entries[script].startswith(f'{m}:') for m, script in MODULES.items() if m != 'moe_merge_nb')


@pytest.mark.parametrize('module', MODULES)
def test_a_module_prints_what_its_script_prints(answers, module):
    script = MODULES[module]
    arguments = ARGUMENTS.get(script, ['--help'])
    code, said = answers('module', module, arguments)
    assert code == 0 and len(said.splitlines()) > 5
    assert [code, said] == answers('script', scripts()[script], arguments)
