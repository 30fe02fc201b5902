import os, signal
from pathlib import Path
import pytest
from moe_merge_nb.safe.guard import *
import subprocess, sys, textwrap
def child(script, directory):
    "Another process, which runs `script` with the directory as its argument"
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, '-c', textwrap.dedent(script), directory]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': path}, **pipes)


def test_a_second_process_is_refused_by_name():
    import tempfile
    SCRIPT = '''
    import sys
    from moe_merge_nb.safe.guard import *
    with locked(sys.argv[1]):
        print("mine", flush=True)
        sys.stdin.read()
    '''
    with tempfile.TemporaryDirectory() as d:
        other = child(SCRIPT, d)
        assert other.stdout.readline() == b'mine\n'
        with pytest.raises(InUse, match=f'{d} is in use by process {other.pid} on'):
            with locked(d): pass
        other.kill()  # SIGKILL: it cannot give the lock back
        other.communicate()
        assert owner(d)[0] == other.pid and dead(owner(d))
        with locked(d): assert owner(d)[0] == os.getpid()
        assert owner(d) is None


def test_the_children_of_a_killed_process_are_waited_for():
    import tempfile
    SCRIPT = '''
    import os, sys, time
    from moe_merge_nb.safe.guard import *
    with locked(sys.argv[1]):
        if os.fork() == 0:
            time.sleep(1.5)
            os._exit(0)
        print("mine", flush=True)
        os.kill(os.getpid(), 9)
    '''
    with tempfile.TemporaryDirectory() as d:
        other = child(SCRIPT, d)
        other.stdout.readline()
        other.wait()
        with locked(d): pass


def test_a_signal_is_remembered_and_the_second_one_ends():
    for number in (signal.SIGINT, signal.SIGTERM):
        was = signal.getsignal(number)
        with Stop() as stop:
            os.kill(os.getpid(), number)
            assert stop.number == number and signal.getsignal(number) is was
            with pytest.raises(Stopped, match=f'stopped by {number.name}') as e: stop.check()
        assert e.value.number == number and signal.getsignal(number) is was
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    with pytest.raises(KeyboardInterrupt), Stop():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, was);


def test_where_nothing_can_be_lost_the_end_is_immediate():
    with Stop() as stop:
        with pytest.raises(Stopped):
            with stop.now():
                os.kill(os.getpid(), signal.SIGTERM)
                assert False
        with pytest.raises(Stopped):
            with stop.now(): assert False
