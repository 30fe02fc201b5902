"""The commands as a user types them, in processes of their own: the sweep starts anew, the others are forked."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest
from moe_merge_nb.safe.checkpoint import read_tree
from toys import begin, end

TINY = [
    'stream=toy',
    'stream.n_tasks=2',
    'model=toy',
    'train.iterations=3',
    'train.warmup=1',
    'train.batch=8',
    'experts.n_experts=4',
    'experts.rank=2',
]
SWEEP = [
    'merge.combine=mean,my_rules.task_arithmetic',
    'experts.shared_init=true',
    'merge.every=1',
    'merge.until=1',
    'selectors=[oracle]',
    'hydra/launcher=processes',
    'hydra.launcher.n_jobs=1',
    'hydra.sweep.dir=sweep',
    'hydra.sweep.subdir=${hydra.job.num}',
]
LONG = ['train.iterations=60', 'save_every=6', 'selectors=[oracle]', 'hydra.run.dir=run']
BAD = [
    ('experts.top_k=5', 'top_k is 5, but there are 4 experts'),
    ('experts.ranks=8', 'ranks'),
    ('method=moo', 'moo'),
]

RULE = '''
def task_arithmetic(states, counts, base):
    return {n: base[n] + 0.5 * sum(s[n] - base[n] for s in states) for n in base}
'''

def test_a_sweep_runs_every_combination_and_finds_a_rule_of_ones_own(tmp_path):
    (tmp_path/'my_rules.py').write_text(RULE)
    command = [str(Path(sys.executable).with_name('moe-merge')), '-m', *TINY, *SWEEP]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    configs = [json.loads((tmp_path/'sweep'/n/'config.json').read_text()) for n in '01']
    assert configs[0]['merge']['combine'] == 'mean'
    assert 'task_arithmetic' in configs[1]['merge']['combine']
    events = [(tmp_path/'sweep'/n/'events.jsonl').read_text() for n in '01']
    assert all(e.count('"merge"') > 0 for e in events)

@pytest.mark.parametrize('bad, says', BAD)
def test_bad_settings_end_with_one_message_and_leave_nothing(tmp_path, bad, says):
    code = end(begin([*TINY, bad], tmp_path))
    said = (tmp_path/'err.txt').read_text()
    assert code != 0
    assert says in said and 'Traceback' not in said
    assert not list(tmp_path.rglob('config.json'))

def saved(run):
    "How far a run is: tasks done, iterations of the next one."
    path = run/'checkpoint.safetensors'
    if not path.is_file(): return 0, 0
    try: tree = read_tree(path)
    except (OSError, RuntimeError): return 0, 0  # it is being replaced at this moment
    snapshot = tree['snapshot'] or {}
    if 'task' in snapshot: return tree['done'], snapshot['task']['iteration']
    return tree['done'], 60 if snapshot else 0

def interrupted(cwd, args, number):
    "Start the command, and end it with this signal when more is saved than before; its exit code."
    before, until = saved(cwd/'run'), time.time() + 300
    pid = begin(args, cwd)
    while saved(cwd/'run') <= before:
        assert time.time() < until
        time.sleep(.02)
    os.kill(pid, number)
    return end(pid)

def test_ctrl_c_and_sigterm_end_a_run_with_130_and_143_and_the_same_command_goes_on(tmp_path):
    args, run = [*TINY, *LONG], tmp_path/'run'
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before = saved(run)
        assert interrupted(tmp_path, args, number) == code
        said = (tmp_path/'err.txt').read_text()
        assert 'the same command goes on from' in said and 'Traceback' not in said
        assert not (run/'.lock.owner').exists()
        assert saved(run) > before
    assert end(begin(args, tmp_path)) == 0
    assert len((run/'matrix.csv').read_text().splitlines()) == 1 + 2 * 2
    assert not list(run.glob('checkpoint*'))
