"""What many tests need: one small adapted CLIP; the command in a process of its own."""
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
import torch
from hydra.core.plugins import Plugins
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.run import cli, command, workers  # noqa: F401
from moe_merge_nb.run.options import configure


def toy_model(n_tasks=2, seed=0, name='pico', **kinds):
    "An adapted CLIP whose adapters say something, random and not trained; its tokenizer."
    clip, tokenizer = load_clip(name, 'random')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AdaptedCLIP(clip, **{'n_experts': 4, 'rank': 4, 'scale': 1., **kinds})
        for _ in range(n_tasks): model.add_task()
        for m in model.moes:
            for e in m.experts: torch.nn.init.normal_(e.up.weight, std=.3)
            for w in m.routers.parameters(): torch.nn.init.normal_(w)
    return model.eval(), tokenizer


# ---- the command

SMALL = [
    'method=moe_merge', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'save_every=4', 'train.iterations=8',
    'train.warmup=2', 'selectors=[oracle]', 'train.batch=8', 'experts.n_experts=6', 'experts.rank=2']
LEFT = ['matrix.csv', 'selection.csv', 'usage.csv', 'fixed.csv', 'events.jsonl', 'adapters.safetensors']

def told():
    "Hydra knows of every choice and of its plugins, before a process is forked: a third of what a small run costs."
    configure()
    Plugins.instance()

def begin(arguments, cwd='.', out='out.txt', err='err.txt'):
    """`moe-merge` in a forked process: its number. To start Python and to import torch costs more than what is tested.
    It has its own output, signals and exit code."""
    told()
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        os.chdir(cwd)
        for fd, name in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), fd)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), 'w', buffering=1) for fd in (1, 2))
        torch.set_num_threads(1)
        sys.argv = ['moe-merge', *arguments]
        cli.main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)

def end(pid):
    "The exit code of a process, once it has ended."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def ended(pid):
    "Has it?"
    return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

def killed(pid, file):
    "SIGKILL as soon as the process has made a file; was it still at work?"
    while not Path(file).exists() and not ended(pid): time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    return end(pid) == -signal.SIGKILL

def ends_alike(folder='.'):
    "Both runs of `whole_and_killed` ended with the same bytes."
    for name in LEFT: assert Path(folder, 'whole', name).read_bytes() == Path(folder, 'killed', name).read_bytes(), name

def whole_and_killed(arguments):
    "Two runs, of which one is killed when it has saved something, and goes on."
    assert end(begin([*arguments, 'hydra.run.dir=whole'])) == 0, Path('err.txt').read_text()
    again = [*arguments, 'hydra.run.dir=killed']
    assert killed(begin(again), 'killed/checkpoint.safetensors')
    assert end(begin(again)) == 0, Path('err.txt').read_text()


# ---- a sweep

class Forked:
    "A worker that is a fork of this process instead of a new one: what `workers.hired` asks of subprocess.Popen."
    def __init__(self, command, pass_fds, **how):
        told()
        self.code, self.pid = None, os.fork()
        if not self.pid: self.begin([int(n) for n in command[3:5]], pass_fds[0])

    def begin(self, numbers, kept):
        "As a new process would: a session, signals, files and output of its own."
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.closerange(3, kept)
            os.closerange(kept + 1, 1024)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), 'w', buffering=1) for fd in (1, 2))
            workers.work(*numbers)
            code = 0
        except SystemExit as e: code = e.code
        except BaseException: traceback.print_exc()
        finally: os._exit(code)

    def wait(self, how=0):
        "Its exit code, once it has ended."
        if self.code is None:
            pid, status = os.waitpid(self.pid, how)
            if pid: self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def poll(self):
        "Its exit code, if it has ended."
        return self.wait(os.WNOHANG)

    def send_signal(self, number):
        "Unless it has ended."
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self):
        "At once."
        self.send_signal(signal.SIGKILL)

@contextmanager
def forked():
    "Inside, workers of a sweep start warm: to start Python and to import torch costs more than what is tested."
    popen = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    with patch.object(workers, 'subprocess', popen): yield
