"""A sweep side by side keeps what a single run promises: whoever is asked to end saves first, nobody is left behind,
and the same command goes on."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest
from filelock import FileLock
from moe_merge_nb.run.line import LAUNCHER
from moe_merge_nb.run import cli
from moe_merge_nb.run.sweep import at_once, side_by_side
from moe_merge_nb.run.workers import hired
from moe_merge_nb.safe.checkpoint import read_tree
from test_cli_process import TINY
from toys import begin, end, forked

def until(condition, seconds=300):
    "Wait for it."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.02)

def alive(pid):
    "Does the process work? (one that is gone but that nobody has asked for does not)"
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False


# ---- any task: jobs that cost nothing

TASKS = """
import os, signal, sys, time
from pathlib import Path
from moe_merge_nb.run.sweep import side_by_side
from moe_merge_nb.safe.guard import Stop, Stopped

def odd(job):
    if job == 1: raise ValueError('job 1 cannot be')
    if job == 3: os.kill(os.getpid(), signal.SIGKILL)
    return 10 * job

def saves(job):
    with Stop() as stop:
        Path(f'started{job}').write_text(str(os.getpid()))
        while not stop.number: time.sleep(.02)
        time.sleep(.2)
        Path(f'saved{job}').write_text(str(stop.number))
        stop.check()

def deaf(job):
    signal.signal(signal.SIGINT, lambda *_: Path(f'heard{job}').touch())
    Path(f'started{job}').write_text(str(os.getpid()))
    while True: time.sleep(.02)

if __name__ == '__main__':
    import tasks
    try: side_by_side(getattr(tasks, sys.argv[1]), [0, 1, 2], 2)
    except Stopped as e: sys.exit(f'{e.number}: {e}')
    except KeyboardInterrupt: sys.exit('interrupted')
"""

@pytest.fixture
def started(tmp_path, monkeypatch):
    "A program that does one of the tasks, once two workers are at it; their process ids."
    (tmp_path/'tasks.py').write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    def start(task):
        how = dict(cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        p = subprocess.Popen([sys.executable, 'tasks.py', task], **how)
        until(lambda: all(Path(f'started{i}').is_file() and Path(f'started{i}').read_text() for i in (0, 1)))
        return p, [int(Path(f'started{i}').read_text()) for i in (0, 1)]
    return start

def test_a_job_that_fails_or_dies_takes_no_other_with_it(tmp_path, monkeypatch, capfd):
    (tmp_path/'odd_tasks.py').write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    from odd_tasks import odd
    assert side_by_side(odd, [0, 1, 2, 3, 4, 5], 2) == [0, None, 20, None, 40, 50]
    said = capfd.readouterr().err
    assert 'ValueError: job 1 cannot be' in said and 'job 3: its process was ended by SIGKILL' in said

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_every_worker_is_asked_once_and_is_waited_for(started, number):
    p, workers = started('saves')
    p.send_signal(number)
    said = p.communicate(timeout=300)[1]
    assert f'{int(number)}: the sweep was stopped, 0 of 3 jobs are finished' in said and 'Traceback' not in said
    assert [Path(f'saved{i}').read_text() for i in (0, 1)] == [str(int(number))] * 2
    assert not any(map(alive, workers)) and not Path('started2').exists()

def test_a_second_ctrl_c_ends_all_at_once(started):
    p, workers = started('deaf')
    p.send_signal(signal.SIGINT)
    until(lambda: Path('heard0').exists() and Path('heard1').exists())
    p.send_signal(signal.SIGINT)
    assert 'interrupted' in p.communicate(timeout=300)[1]
    assert not any(map(alive, workers))

def test_workers_that_are_there_already_are_taken_and_the_others_are_ended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path/'who.py').write_text('import os, sys\ndef who(job): return os.getpid(), "wave" in sys.modules')
    from who import who
    three = [hired('wave') for _ in range(3)]
    made = side_by_side(who, [0, 1, 2], 2, three)
    assert {pid for pid, _ in made} <= {w.process.pid for w in three[:2]} and all(there for _, there in made)
    assert all(w.process.poll() is not None for w in three)

@pytest.mark.parametrize('line, n', [
    ('method=moe', 0),
    ('-m seed=0,1', 0),
    ('-m seed=0,1 hydra/launcher=processes', 2),
    ('-m seed=0,1 hydra/launcher=processes hydra.launcher.n_jobs=1', 1),
    ('--multirun experiment=demo', 2)])
def test_a_sweep_side_by_side_has_workers_from_the_beginning(line, n, monkeypatch):
    monkeypatch.setattr(cli, 'JOB', 'math')
    monkeypatch.setattr(os, 'cpu_count', lambda: 8)
    with cli.spare(line.split()) as workers:
        assert len(workers) == n and all(w.process.poll() is None for w in workers)
    assert all(w.process.poll() is not None for w in workers)

def test_how_many_processes():
    assert at_once(4, 2) == 2 and at_once(2, 9) == 2 and 1 <= at_once(-1, 9) <= 9
    for bad in (0, -2, 'two', True):
        with pytest.raises(ValueError, match='hydra.launcher.n_jobs'): at_once(bad, 3)
    assert LAUNCHER['n_jobs'] == -1


# ---- a real sweep: two jobs that can be, two that cannot

SWEEP = [
    '-m',
    *TINY,
    'seed=0,1',
    'experts.top_k=2,5',
    'train.iterations=60',
    'save_every=6',
    'selectors=[oracle]',
    'hydra/launcher=processes',
    'hydra.launcher.n_jobs=2']

def runs(folder):
    "Directories of the two jobs that can be."
    return [p.parent for p in sorted(folder.glob('runs/moe_merge/*/config.json'))]

def far(run):
    "Tasks done, iterations of the next one; None where nothing is saved."
    try: tree = read_tree(run/'checkpoint.safetensors')
    except (OSError, RuntimeError): return None                     # or it is being replaced at this moment
    return tree['done'], ((tree['snapshot'] or {}).get('task') or {}).get('iteration', 0)

def at_work(folder, pid, before=(0, 0)):
    "Process ids of the workers of a sweep, once one has saved more than before and goes on."
    until(lambda: any((r/'.lock.owner').is_file() and (far(r) or before) > before for r in runs(folder)))
    return [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]

def is_left(folder, workers):
    "Processes, locks and shared memory that are still there."
    found = [w for w in workers if alive(w)]
    for r in runs(folder):
        with FileLock(r/'.lock', timeout=0): pass
    shared = [p.name for p in Path('/dev/shm').iterdir()] if Path('/dev/shm').is_dir() else []
    return found + [name for name in shared if any(str(w) in name for w in workers)]

@pytest.fixture
def warm():
    "Workers that need not import what this process has; `test_cli_process` has a sweep of new ones."
    with forked(): yield

@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='who works for whom is read from /proc')
def test_ctrl_c_and_a_killed_parent_lose_nothing_and_the_same_command_goes_on(tmp_path, warm):
    first = begin(SWEEP, tmp_path)
    workers = at_work(tmp_path, first)
    os.kill(first, signal.SIGINT)
    assert end(first) == 130
    said, before = (tmp_path/'err.txt').read_text(), max(far(r) or (0, 0) for r in runs(tmp_path))
    assert said.count('the same command goes on from') >= 2 and 'Traceback' not in said
    assert before > (0, 0) and len(workers) == 2 and not is_left(tmp_path, workers)

    second = begin(SWEEP, tmp_path)
    workers = at_work(tmp_path, second, before)
    os.kill(second, signal.SIGKILL)
    assert end(second) == -signal.SIGKILL
    until(lambda: not any(map(alive, workers)))
    assert len(workers) == 2 and not is_left(tmp_path, workers)
    assert 'the same command goes on from' in (tmp_path/'err.txt').read_text()

    assert end(begin([*SWEEP[:-1], 'hydra.launcher.n_jobs=1'], tmp_path)) == 1
    said = (tmp_path/'err.txt').read_text()
    assert '2 of 4 jobs failed' in said and 'Traceback' not in said
    assert said.count('top_k is 5, but there are 4 experts') == 2 and 'moe-merge: job 1 (' in said
    assert len(runs(tmp_path)) == 2
    assert all((r/'matrix.csv').is_file() and not list(r.glob('checkpoint*')) for r in runs(tmp_path))
