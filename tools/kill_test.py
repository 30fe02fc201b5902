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
from pathlib import Path
from threading import RLock
import numpy as np
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from tqdm import tqdm
from moe_merge_nb.baselines.icarl import ICaRL
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.baselines.zscl import ZSCL
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.learn import loop, plan, recover
from moe_merge_nb.learn.callbacks import FreezeMostUsed
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.safe.checkpoint import contents as held
from moe_merge_nb.streams.tasks import Images, Stream, Task

PHASES = ['beginning', 'training', 'saving', 'evaluation', 'the end']
AIMS = ['training', 'saving', 'evaluation', 'any'] # of the kills, in turns
COLUMNS = ['case', 'method', 'kill', 'phase', 'task', 'iteration', 'seconds', 'equal']
EQUAL = '.csv', '.jsonl', '.safetensors', '.sha256' # matrix, choices, usage, frozen experts, events, weights
CLASSES = 'red', 'green', 'blue'


def tiny() -> CLIP:
    "A CLIP of two blocks a tower for images of 8 x 8 pixels."
    torch.manual_seed(0)
    image = CLIPVisionCfg(image_size=8, patch_size=4, width=16, layers=2, head_width=8)
    text = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=2)
    return CLIP(16, image, text).eval().requires_grad_(False)


def images(n: int, seed: int) -> Images:
    "Noise."
    pixels = np.random.default_rng(seed).integers(0, 255, (n, 3, 8, 8), dtype='uint8')
    return Images(pixels, np.arange(n) % 3)


def stream() -> Stream:
    "Three tasks of noise."
    tasks = [Task(name, CLASSES, ('a {} thing.',), images(24, i), images(12, i + 10)) for i, name in enumerate('abc')]
    return Stream('noise', tuple(tasks))


def full(name: str, baseline) -> Method:
    "Full fine-tuning with a baseline."
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
        selectors=('oracle', 'gaussian', 'text'),
    )
    icarl, zscl = ICaRL(memory_size=18, batch=4), ZSCL(every=3, n=16, batch=4, l2=.1)
    return [moe, full('lwf', LwF()), moe, full('icarl', icarl), moe, full('zscl', zscl)]


class Phase:
    "What is going on, in memory that parent and child share: phase, saves begun, task, iteration."
    def __init__(self): self.memory = mmap.mmap(-1, 16)
    def get(self) -> tuple[int, ...]: return struct.unpack('4i', self.memory[:])
    def put(self, at: int, value: int): self.memory[4*at:4*at + 4] = struct.pack('i', value)

    def during(self, number: int, function: Callable) -> Callable:
        "`function`, which notes that it is at work."
        def call(*args, **kw):
            before, saves = self.get()[:2]
            self.put(0, number)
            if number == 2: self.put(1, saves + 1)
            try: return function(*args, **kw)
            finally: self.put(0, before)
        return call


def watched(phase: Phase):
    "Note in `phase` what is going on."
    save, step = recover.save, recover.SaveMiddle.after_step
    def save_(r, middle=False):
        if r.done == len(r.stream): # the weights of a backbone are in no result
            weights = b''.join(w.numpy().tobytes() for w in r.tuned.state_dict().values())
            Path(r.directory, 'weights.sha256').write_text(hashlib.sha256(weights).hexdigest())
        return save(r, middle)
    def after_step(self, learner):
        phase.put(2, learner.index)
        phase.put(3, learner.iteration)
        step(self, learner)
    plan.provenance = lambda device: {}                                         # a commit in the meantime is no fault
    loop.train_task = phase.during(1, loop.train_task)
    loop.evaluate_all = phase.during(3, loop.evaluate_all)
    recover.save = phase.during(2, save_)
    recover.SaveMiddle.after_step = after_step


def child(method: Method, directory: str, world: tuple, phase: Phase) -> int: # process id
    "Begin, or continue, the run in a process of its own."
    if pid := os.fork(): return pid
    code = 1
    try:
        warnings.simplefilter('error')                                          # a resumption has nothing to warn of
        watched(phase)
        backbone, accelerator = world
        options = dict(progress=False, accelerator=accelerator, save_every=3)
        loop.run(stream(), method, 0, backbone, directory=directory, **options)
        phase.put(0, 4)
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def scratch() -> tempfile.TemporaryDirectory:
    "A folder in memory where there is one: to SIGKILL it is a disk, only faster."
    return tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None)


def end(pid: int) -> int:
    "Wait for it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(path: Path) -> object:
    "Its bytes; of tensors with a header what they are, since the order of a header's entries is chance."
    if path.suffix != '.safetensors': return path.read_bytes()
    header, tensors = held(path)
    return sorted(header.items()), {name: t.numpy().tobytes() for name, t in tensors.items()}


def contents(directory: str) -> dict[str, object]:
    "What must be equal."
    return {p.name: content(p) for p in sorted(Path(directory).iterdir()) if p.suffix in EQUAL}


def kill(pid: int, phase: Phase, rng: random.Random, seconds: float, aim: str) -> bool: # False: it was through before
    """SIGKILL at a random moment of the run, or of the phase `aim`: the process is stopped, and goes on if it has left
    that phase in the meantime."""
    task, iteration = rng.randint(0, 2), rng.randint(1, 8)
    until = time.perf_counter() + rng.uniform(0, seconds)

    def there() -> bool:
        if aim == 'any': return time.perf_counter() > until
        now = phase.get()
        return PHASES[now[0]] == aim and now[2:] >= (task, iteration)

    def through() -> bool: return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

    while True:
        while not there() and not through(): time.sleep(2e-4)
        time.sleep(rng.uniform(0, .002))
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        hit = there()                                                           # while it is stopped nothing changes
        os.kill(pid, signal.SIGKILL if hit else signal.SIGCONT)
        if hit or through(): return end(pid) == -signal.SIGKILL


def case(i: int, method: Method, straight: tuple, world: tuple, rng: random.Random, before: int) -> list[dict]:
    "Rows of one case: one or two kills, then to the end."
    (files, seconds), rows = straight, []
    with scratch() as d:
        for k in range(1 + (rng.random() < .3)):
            phase, begin = Phase(), time.perf_counter()
            pid = child(method, d, world, phase)
            aim = AIMS[(before + len(rows)) % len(AIMS)]
            if not kill(pid, phase, rng, seconds=seconds, aim=aim): continue
            what, _, task, iteration = phase.get()
            spent = round(time.perf_counter() - begin, 3)
            row = dict(case=i, method=method.name, kill=k, phase=PHASES[what])
            rows.append(dict(row, task=task, iteration=iteration, seconds=spent))
        code = end(child(method, d, world, Phase()))
        equal = code == 0 and contents(d) == files
    return [dict(r, equal=equal) for r in rows]


def undisturbed(method: Method, world: tuple) -> tuple[dict[str, bytes], float]:
    "What a run ends with, and the seconds it takes."
    with scratch() as d:
        begin = time.perf_counter()
        if end(child(method, d, world, Phase())): sys.exit('the undisturbed run failed')
        return contents(d), time.perf_counter() - begin


def main(n: int, seed: int, out: str | None) -> int:
    "Kill `n` times; 0 if all runs ended with the same bytes."
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())                                                      # forked processes share the default one
    world = (tiny(), pico_tokenizer()), Accelerator(cpu=True)
    rng, straight, rows, i = random.Random(seed), {}, [], 0
    while len(rows) < n and i < 5 * n:                                          # a kill that came too late is none
        method = methods()[i % 6]
        if method.name not in straight: straight[method.name] = undisturbed(method, world)
        rows += case(i, method, straight[method.name], world, rng=rng, before=len(rows))
        i += 1
    phases = {p: sum(r['phase'] == p for r in rows) for p in PHASES}
    equal = all(r['equal'] for r in rows)
    print(f'{len(rows)} kills in {i} runs: {phases}; all equal: {equal}')
    if out:
        with open(out, 'w', newline='') as f:
            table = csv.DictWriter(f, COLUMNS, lineterminator='\n')
            table.writeheader()
            table.writerows(rows)
    return 0 if len(rows) >= n and equal else 1


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('n', type=int, nargs='?', default=100, help='kills')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='CSV file for the rows')
    a = p.parse_args()
    sys.exit(main(a.n, a.seed, a.out))
