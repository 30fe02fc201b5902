"""Kill a small run with SIGKILL at random moments of each phase, start it again, and compare what it ends with to the undisturbed run, byte for byte.

    python tools/kill_test.py 100 --out moe_merge_nb/data/kills.csv

Everything is imported once; every run is a forked child, so that a kill and a resumption cost about a second."""
import argparse, csv, hashlib, mmap, os, random, signal, struct, sys, tempfile, time, warnings
from pathlib import Path
import numpy as np
import torch
from accelerate import Accelerator
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.learn import loop, state
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.learn.callbacks import FreezeMostUsed
from moe_merge_nb.baselines.icarl import ICaRL
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.learn.method import Method
from moe_merge_nb.streams.tasks import Images, Stream, Task
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.baselines.zscl import ZSCL

PHASES = ['beginning', 'training', 'saving', 'evaluation', 'the end']
AIMS = ['training', 'saving', 'evaluation', 'any'] # of the kills, in turns
COLUMNS = ['case', 'method', 'kill', 'phase', 'task', 'iteration', 'seconds', 'equal']

def tiny():
    "A CLIP of two blocks a tower for images of 8 x 8 pixels."
    torch.manual_seed(0)
    return CLIP(16, CLIPVisionCfg(image_size=8, patch_size=4, width=16, layers=2, head_width=8), CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=2)).eval().requires_grad_(False)

def stream():
    "Three tasks of noise."
    images = lambda n, seed: Images(np.random.default_rng(seed).integers(0, 255, (n, 3, 8, 8), dtype='uint8'), np.arange(n) % 3)
    return Stream('noise', tuple(Task(name, ('red', 'green', 'blue'), ('a {} thing.',), images(24, i), images(12, i + 10)) for i, name in enumerate('abc')))

def methods():
    "Methods that keep something in the middle of a task."
    train = Train(iterations=9, batch=4, lr=1e-2, warmup=2)
    full = lambda name, baseline: Method(name, tune='backbone', experts=None, train=Train(iterations=9, batch=4, lr=1e-4, warmup=2), freeze=None, selectors=('none',), baseline=baseline)
    moe = Method('moe_merge', experts=dict(n_experts=8, rank=2), train=train, merge=Merge(every=3, protect=True), freeze=FreezeMostUsed(1), selectors=('oracle', 'gaussian', 'text'))
    return [moe, full('lwf', LwF()), moe, full('icarl', ICaRL(memory_size=18, batch=4)), moe, full('zscl', ZSCL(every=3, n=16, batch=4, l2=.1))]

def watched(phase:mmap.mmap):
    "Note in `phase` what is going on: phase, saves begun, task, iteration."
    def put(at, value): phase[4*at:4*at + 4] = struct.pack('i', value)
    def get(at): return struct.unpack('i', phase[4*at:4*at + 4])[0]
    def during(number, function):
        def call(*args, **kw):
            before = get(0)
            put(0, number)
            if number == 2: put(1, get(1) + 1)
            try: return function(*args, **kw)
            finally: put(0, before)
        return call
    save = loop.save
    def save_(r, directory, plan, middle=False):
        if r.done == len(plan['tasks']):                                        # the weights of a backbone are in no result
            weights = state.tuned(r).state_dict()
            Path(directory, 'weights.sha256').write_text(hashlib.sha256(b''.join(w.numpy().tobytes() for w in weights.values())).hexdigest())
        return save(r, directory, plan, middle)
    step = loop.Keep.after_step
    def after_step(self, learner):
        put(2, learner.index); put(3, learner.iteration)
        step(self, learner)
    loop.provenance = lambda device: {}                                         # a commit in the meantime is no fault
    loop.save, loop.train_task, loop.evaluate, loop.fit, loop.Keep.after_step = during(2, save_), during(1, loop.train_task), during(3, loop.evaluate), during(3, loop.fit), after_step

def child(method, directory, backbone, accelerator, phase)->int: # process id
    "Begin, or continue, the run in a process of its own."
    if pid := os.fork(): return pid
    code = 1
    try:
        warnings.simplefilter('error')                                          # a resumption has nothing to warn of
        watched(phase)
        loop.run(stream(), method, 0, backbone, directory, progress=False, accelerator=accelerator, save_every=3)
        phase[0:4] = struct.pack('i', 4)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)

def scratch():
    "A folder in memory where there is one: to SIGKILL it is a disk, only faster."
    return tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else None)

def end(pid:int)->int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(directory)->dict:
    "What must be equal: matrix, choices, usage, frozen experts, events, weights."
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir()) if p.suffix in ('.csv', '.jsonl', '.safetensors', '.sha256')}

def kill(pid:int, phase:mmap.mmap, rng:random.Random, seconds:float, aim:str)->bool: # False: it was through before
    "SIGKILL at a random moment of the run, or of the phase `aim`: the process is stopped, and goes on if it has left that phase in the meantime."
    now, task, iteration, until = lambda: struct.unpack('4i', phase[:]), rng.randint(0, 2), rng.randint(1, 8), time.perf_counter() + rng.uniform(0, seconds)
    there = lambda: time.perf_counter() > until if aim == 'any' else PHASES[now()[0]] == aim and now()[2:] >= (task, iteration)
    while True:
        while not there() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): time.sleep(2e-4)
        time.sleep(rng.uniform(0, .002))
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        hit = there()                                                           # while it is stopped nothing changes
        os.kill(pid, signal.SIGKILL if hit else signal.SIGCONT)
        if hit or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): return end(pid) == -signal.SIGKILL

def case(i:int, method, straight:tuple, backbone, accelerator, rng:random.Random, before:int):
    "Rows of one case: one or two kills, then to the end."
    files, seconds = straight
    rows, phase = [], mmap.mmap(-1, 16)
    with scratch() as d:
        for k in range(1 + (rng.random() < .3)):
            phase[:] = bytes(16)
            begin = time.perf_counter()
            pid = child(method, d, backbone, accelerator, phase)
            if kill(pid, phase, rng, seconds, AIMS[(before + len(rows)) % len(AIMS)]):
                what, _, task, iteration = struct.unpack('4i', phase[:])
                rows.append(dict(case=i, method=method.name, kill=k, phase=PHASES[what], task=task, iteration=iteration, seconds=round(time.perf_counter() - begin, 3)))
        code = end(child(method, d, backbone, accelerator, phase))
        equal = code == 0 and contents(d) == files
    return [dict(r, equal=equal) for r in rows]

def main(n:int, seed:int, out:str|None):
    torch.set_num_threads(1)
    backbone, accelerator, rng = (tiny(), pico_tokenizer()), Accelerator(cpu=True), random.Random(seed)
    straight, rows, i = {}, [], 0
    while len(rows) < n and i < 5 * n:                                          # a kill that came too late is none
        method = methods()[i % 6]
        if method.name not in straight:
            with scratch() as d:
                begin = time.perf_counter()
                if end(child(method, d, backbone, accelerator, mmap.mmap(-1, 16))): sys.exit('the undisturbed run failed')
                straight[method.name] = contents(d), time.perf_counter() - begin
        rows += case(i, method, straight[method.name], backbone, accelerator, rng, len(rows))
        i += 1
    phases = {p: sum(r['phase'] == p for r in rows) for p in PHASES}
    print(f'{len(rows)} kills in {i} runs: {phases}; all equal: {all(r["equal"] for r in rows)}')
    if out:
        with open(out, 'w', newline='') as f: (w := csv.DictWriter(f, COLUMNS, lineterminator='\n')).writeheader(); w.writerows(rows)
    return 0 if len(rows) >= n and all(r['equal'] for r in rows) else 1

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('n', type=int, nargs='?', default=100, help='kills')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', help='CSV file for the rows')
    a = p.parse_args()
    sys.exit(main(a.n, a.seed, a.out))
