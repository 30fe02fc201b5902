"""The commands as a user types them, in processes of their own. Starting Python and importing torch costs more than what is tested, so only the sweep starts anew; the other
commands are children of one process that has everything imported and has done nothing yet. They have their own output, their own signals and their own exit code."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from moe_merge_nb.safe.checkpoint import read_tree

TINY = ['stream=toy', 'stream.n_tasks=2', 'model=random', 'train.iterations=3', 'train.warmup=1', 'train.batch=8', 'experts.n_experts=4', 'experts.rank=2']

SERVER = '''
import json, os, sys
from moe_merge_nb.run import cli
for line in sys.stdin:
    what, value, cwd = json.loads(line)
    if what == 'wait': print(os.waitstatus_to_exitcode(os.waitpid(value, 0)[1]), flush=True)
    elif pid := os.fork(): print(pid, flush=True)
    else:
        os.chdir(cwd)
        for fd, name in ((0, os.devnull), (1, 'out.txt'), (2, 'err.txt')): os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ['moe-merge', *value]
        sys.exit(cli.main())
'''

@pytest.fixture(scope='module')
def server():
    "Starts `moe-merge` with these arguments in a directory: its process id; and waits for a process: its exit code."
    s = subprocess.Popen([sys.executable, '-c', SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def ask(*question):
        s.stdin.write(json.dumps(question) + '\n')
        s.stdin.flush()
        return int(s.stdout.readline())
    yield (lambda args, cwd: ask('start', args, str(cwd))), (lambda pid: ask('wait', pid, ''))
    s.stdin.close()
    s.wait(60)

def test_a_sweep_runs_every_combination_side_by_side_and_finds_a_rule_of_ones_own(tmp_path):
    (tmp_path/'my_rules.py').write_text('def task_arithmetic(states, counts, base):\n    return {n: base[n] + 0.5 * sum(s[n] - base[n] for s in states) for n in base}\n')
    rules = 'merge.combine=mean,my_rules.task_arithmetic'
    args = ['-m', *TINY, rules, 'experts.shared_init=true', 'merge.every=1', 'merge.until=1', 'hydra/launcher=joblib', 'hydra.launcher.n_jobs=2', 'hydra.sweep.dir=sweep', 'hydra.sweep.subdir=${hydra.job.num}']
    done = subprocess.run([str(Path(sys.executable).with_name('moe-merge')), *args], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    configs = [json.loads((tmp_path/'sweep'/n/'config.json').read_text()) for n in '01']
    assert configs[0]['merge']['combine'] == 'mean' and 'task_arithmetic' in configs[1]['merge']['combine']
    events = [(tmp_path/'sweep'/n/'events.jsonl').read_text() for n in '01']
    assert all(e.count('"merge"') > 0 for e in events)

@pytest.mark.parametrize('bad, says', [('experts.top_k=5', 'top_k is 5, but there are 4 experts'), ('experts.ranks=8', 'ranks'), ('method=moo', 'moo')])
def test_bad_settings_end_with_one_message_and_leave_nothing(server, tmp_path, bad, says):
    start, wait = server
    code, said = wait(start([*TINY, bad], tmp_path)), (tmp_path/'err.txt').read_text()
    assert code != 0 and says in said and 'Traceback' not in said
    assert not list(tmp_path.rglob('config.json'))

def test_ctrl_c_and_sigterm_end_a_run_with_130_and_143_and_the_same_command_goes_on(server, tmp_path):
    start, wait = server
    args, run = [*TINY, 'train.iterations=40', 'save_every=4', 'selectors=[oracle]', 'hydra.run.dir=run'], tmp_path/'run'
    def saved():
        "How far the run is: tasks done, iterations of the next one."
        if not (run/'checkpoint.safetensors').is_file(): return 0, 0
        try: tree = read_tree(run/'checkpoint.safetensors')
        except (OSError, RuntimeError): return 0, 0                         # it is being replaced at this moment
        return tree['done'], tree['snapshot']['task']['iteration'] if 'task' in (tree['snapshot'] or {}) else 40 * bool(tree['snapshot'])
    before = 0, 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        pid, until = start(args, tmp_path), time.time() + 300
        while saved() <= before: assert time.time() < until; time.sleep(.1)
        os.kill(pid, number)
        assert wait(pid) == code
        said = (tmp_path/'err.txt').read_text()
        assert 'the same command goes on from' in said and 'Traceback' not in said and not (run/'.lock.owner').exists()
        assert saved() > before
        before = saved()
    assert wait(start(args, tmp_path)) == 0
    assert len((run/'matrix.csv').read_text().splitlines()) == 1 + 2 * 2 and not list(run.glob('checkpoint*'))
