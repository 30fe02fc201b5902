"""Kill a small run with SIGKILL at random moments of each phase, start it again, and compare what it ends with to the
undisturbed run, byte for byte.

    python tools/kill_test.py 100 --out moe_merge_nb/data/kills.csv

Everything is imported once; every run is a forked child, so that a kill and a resumption cost about a second."""
import argparse
import csv
import hashlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.baselines.icarl import ICaRL
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.baselines.zscl import ZSCL
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.learn import loop, state
from moe_merge_nb.learn.callbacks import FreezeMostUsed
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.streams.tasks import Images, Stream, Task

PHASES = ['beginning', 'training', 'saving', 'evaluation', 'the end']
AIMS = ['training', 'saving', 'evaluation', 'any']  # of the kills, in turns
COLUMNS = ['case', 'method', 'kill', 'phase', 'task', 'iteration', 'seconds', 'equal']
KEPT = ('.csv', '.jsonl', '.safetensors', '.sha256')  # what must be equal


# ---- the run

def tiny() -> CLIP:
    "A CLIP of two blocks a tower for images of 8 x 8 pixels."
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=8, patch_size=4, width=16, layers=2, head_width=8)
    text = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=2)
    return CLIP(16, vision, text).eval().requires_grad_(False)


def images(n: int, seed: int) -> Images:
    "Noise of three classes."
    pixels = np.random.default_rng(seed).integers(0, 255, (n, 3, 8, 8), dtype='uint8')
    return Images(pixels, np.arange(n) % 3)


def task(index: int) -> Task:
    "One of the tasks."
    classes, templates = ('red', 'green', 'blue'), ('a {} thing.',)
    return Task('abc'[index], classes, templates, train=images(24, index), test=images(12, index + 10))


def stream() -> Stream:
    "Three tasks of noise."
    return Stream('noise', tuple(map(task, range(3))))


def full(name: str, baseline) -> Method:
    "A method that tunes the whole backbone."
    train = Train(iterations=9, batch=4, lr=1e-4, warmup=2)
    return Method(
        name, tune='backbone', experts=None, train=train, freeze=None, selectors=('none',), baseline=baseline)


def methods() -> list[Method]:
    "Methods that keep something in the middle of a task."
    moe = Method(
        'moe_merge',
        experts=dict(n_experts=8, rank=2),
        train=Train(iterations=9, batch=4, lr=1e-2, warmup=2),
        merge=Merge(every=3, protect=True),
        freeze=FreezeMostUsed(1),
        selectors=('oracle', 'gaussian', 'text'))
    lwf = full('lwf', LwF())
    icarl = full('icarl', ICaRL(memory_size=18, batch=4))
    zscl = full('zscl', ZSCL(every=3, n=16, batch=4, l2=.1))
    return [moe, lwf, moe, icarl, moe, zscl]


# ---- what it is doing at any moment

class Phase:
    "Four numbers that a process and its children share: phase, saves begun, task, iteration."
    def __init__(self):
        self.shared = mmap.mmap(-1, 16)

    def __getitem__(self, at: int) -> int:
        return self.all()[at]

    def __setitem__(self, at: int, value: int):
        self.shared[4*at:4*at + 4] = struct.pack('i', value)

    def all(self) -> tuple[int, ...]:
        "The four of them."
        return struct.unpack('4i', self.shared[:])

    def clear(self):
        "At the beginning."
        self.shared[:] = bytes(16)

    def during(
        self,
        name: str,  # of the phase
        function: Callable,
    ) -> Callable:
        "The same function; while it runs, this is the phase."
        def call(*args, **kw):
            before, self[0] = self[0], PHASES.index(name)
            if name == 'saving': self[1] += 1
            try: return function(*args, **kw)
            finally: self[0] = before
        return call


def note_weights(r, directory: str):
    "Beside the result: the weights of a backbone are in no file of it."
    weights = b''.join(w.numpy().tobytes() for w in state.tuned(r).state_dict().values())
    Path(directory, 'weights.sha256').write_text(hashlib.sha256(weights).hexdigest())


def watched(phase: Phase):
    "Note in `phase` what is going on."
    save, step = loop.save, loop.Keep.after_step

    def save_(r, directory, plan, middle=False):
        if r.done == len(plan['tasks']): note_weights(r, directory)
        return save(r, directory, plan, middle)

    def after_step(self, learner):
        phase[2], phase[3] = learner.index, learner.iteration
        step(self, learner)

    loop.provenance = lambda device: {}  # a commit in the meantime is no fault
    loop.save = phase.during('saving', save_)
    loop.train_task = phase.during('training', loop.train_task)
    loop.evaluate = phase.during('evaluation', loop.evaluate)
    loop.fit = phase.during('evaluation', loop.fit)
    loop.Keep.after_step = after_step


# ---- processes

@dataclass
class Around:
    "What all runs share."
    backbone: tuple
    accelerator: Accelerator
    rng: random.Random


def child(
    method: Method,
    directory: str,
    around: Around,
    phase: Phase,
) -> int:  # process id
    "Begin, or continue, the run in a process of its own."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        warnings.simplefilter('error')  # a resumption has nothing to warn of
        watched(phase)
        how = dict(progress=False, accelerator=around.accelerator, save_every=3)
        loop.run(stream(), method, 0, around.backbone, directory=directory, **how)
        phase[0] = PHASES.index('the end')
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def scratch() -> tempfile.TemporaryDirectory:
    "A folder in memory where there is one: to SIGKILL it is a disk, only faster."
    return tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None)


def end(pid: int) -> int:
    "Wait for a process: its exit code."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_over(pid: int) -> bool:
    "Has it ended? Its exit code stays to be asked for."
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def contents(directory: str) -> dict[str, bytes]:
    "What must be equal: matrix, choices, usage, frozen experts, events, weights."
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir()) if p.suffix in KEPT}


def moment(
    phase: Phase,
    rng: random.Random,
    seconds: float,  # that an undisturbed run takes
    aim: str,
) -> Callable[[], bool]:
    "Is the random moment there?"
    task, iteration = rng.randint(0, 2), rng.randint(1, 8)
    until = time.perf_counter() + rng.uniform(0, seconds)
    if aim == 'any': return lambda: time.perf_counter() > until
    number = PHASES.index(aim)
    return lambda: phase[0] == number and phase.all()[2:] >= (task, iteration)


def kill(
    pid: int,
    there: Callable[[], bool],  # is the moment there?
    rng: random.Random,
) -> bool:  # False: it was through before
    "SIGKILL at that moment. The process is stopped, and goes on if the moment has gone by in the meantime."
    while True:
        while not there() and not is_over(pid): time.sleep(2e-4)
        time.sleep(rng.uniform(0, .002))
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        hit = there()  # while it is stopped nothing changes
        os.kill(pid, signal.SIGKILL if hit else signal.SIGCONT)
        if hit or is_over(pid): return end(pid) == -signal.SIGKILL


# ---- cases

@dataclass
class Straight:
    "An undisturbed run."
    files: dict[str, bytes]
    seconds: float


def straight(method: Method, around: Around) -> Straight:
    "Run it without a disturbance."
    with scratch() as d:
        begin = time.perf_counter()
        if end(child(method, d, around, Phase())): sys.exit('the undisturbed run failed')
        return Straight(contents(d), time.perf_counter() - begin)


def case(
    method: Method,
    wanted: Straight,
    around: Around,
    before: int,  # kills so far
) -> list[dict]:
    "Rows of one case: one or two kills, then to the end."
    rows, phase, rng = [], Phase(), around.rng
    with scratch() as d:
        for k in range(1 + (rng.random() < .3)):
            phase.clear()
            begin = time.perf_counter()
            pid = child(method, d, around, phase)
            aim = AIMS[(before + len(rows)) % len(AIMS)]
            if not kill(pid, moment(phase, rng, wanted.seconds, aim), rng): continue
            what, _, task, iteration = phase.all()
            seconds = round(time.perf_counter() - begin, 3)
            rows.append(dict(kill=k, phase=PHASES[what], task=task, iteration=iteration, seconds=seconds))
        code = end(child(method, d, around, phase))
        equal = code == 0 and contents(d) == wanted.files
    return [dict(r, method=method.name, equal=equal) for r in rows]


def write(rows: list[dict], path: str):
    "As CSV."
    with open(path, 'w', newline='') as f:
        table = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        table.writeheader()
        table.writerows(rows)


def main(
    n: int,  # kills
    seed: int,
    out: str|None,  # CSV file for the rows
) -> int:  # exit code
    "Kill `n` times or more, and say whether all runs ended with the same bytes."
    torch.set_num_threads(1)
    around = Around((tiny(), pico_tokenizer()), Accelerator(cpu=True), random.Random(seed))
    undisturbed, rows, i = {}, [], 0
    while len(rows) < n and i < 5 * n:  # a kill that came too late is none
        method = methods()[i % 6]
        if method.name not in undisturbed: undisturbed[method.name] = straight(method, around)
        rows += [dict(r, case=i) for r in case(method, undisturbed[method.name], around, len(rows))]
        i += 1
    phases = {p: sum(r['phase'] == p for r in rows) for p in PHASES}
    equal = all(r['equal'] for r in rows)
    print(f'{len(rows)} kills in {i} runs: {phases}; all equal: {equal}')
    if out: write(rows, out)
    return 0 if len(rows) >= n and equal else 1


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    p.add_argument('n', type=int, nargs='?', default=100, help='kills')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='CSV file for the rows')
    a = p.parse_args()
    sys.exit(main(a.n, a.seed, a.out))
