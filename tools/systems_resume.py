"""Train every system of chapter 9 by its name on three domains of the miniature, from the command line: once
undisturbed, once through SIGKILL after the first checkpoint. Both must leave the same tensors and tables.

    python tools/systems_resume.py                        # all, some minutes on one core
    python tools/systems_resume.py home chain --iterations 30"""
import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
import torch
from moe_merge_nb.baselines.methods import SYSTEMS
from moe_merge_nb.run import cli
from moe_merge_nb.safe.checkpoint import contents, read_newest

DOMAINS = 'Aircraft', 'Caltech', 'CIFAR' # the first three of Order I
TABLES = 'matrix.csv', 'selection.csv', 'usage.csv', 'fixed.csv', 'events.jsonl'


def begin(name: str, directory: Path, iterations: int) -> int: # process id
    "`moe-merge method=NAME` in a process of its own; what it says is added to `out.txt`."
    if pid := os.fork(): return pid
    code = 1
    try:
        torch.set_num_threads(1)
        said = os.open(directory.parent/'out.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd in (1, 2): os.dup2(said, fd)
        order = f'order=[{",".join(DOMAINS)}]'
        settings = f'train.iterations={iterations}', f'save_every={max(1, iterations // 3)}'
        sys.argv = ['moe-merge', f'method={name}', 'stream=mini', order, *settings, f'hydra.run.dir={directory}']
        cli.main()
        code = 0
    except SystemExit as e: os.write(2, f'{e}\n'.encode())
    finally: os._exit(code)


def end(pid: int, directory: Path):
    "Wait for a run; RuntimeError with the end of what it said if it failed."
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError((directory.parent/'out.txt').read_text().splitlines()[-1])


def kill(pid: int, checkpoint: Path) -> str: # where
    "SIGKILL as soon as there is a checkpoint; RuntimeError if the run was through before."
    while not checkpoint.is_file():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): break
        time.sleep(.005)
    os.kill(pid, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL: raise RuntimeError('the run was not killed')
    saved = read_newest(checkpoint)
    middle = saved['snapshot']
    return f"task {saved['done'] + 1}, iteration {middle['task']['iteration'] if middle else 0}"


def differences(whole: Path, killed: Path) -> tuple[int, list[str]]:
    "How many tensors there are, and the tensors and tables that are not the same, byte for byte."
    (_, a), (_, b) = (contents(d/'adapters.safetensors') for d in (whole, killed))
    found = sorted(a.keys() ^ b.keys())
    found += [n for n in a.keys() & b.keys() if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape
              or a[n].numpy().tobytes() != b[n].numpy().tobytes()]
    return len(a), found + [t for t in TABLES if (whole/t).read_bytes() != (killed/t).read_bytes()]


def one(name: str, iterations: int) -> bool:
    "Both runs of a system, told in one line."
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        whole, killed = Path(d)/'whole', Path(d)/'killed'
        end(begin(name, whole, iterations), whole)
        where = kill(begin(name, killed, iterations), killed/'checkpoint.safetensors')
        end(begin(name, killed, iterations), killed)
        n, different = differences(whole, killed)
    said = f'DIFFERENT: {different[:4]}' if different else f'{n} tensors and {len(TABLES)} tables are the same'
    print(f'{name}: killed in {where}; {said}; {time.perf_counter() - start:.0f} s', flush=True)
    return not different


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', default=[*SYSTEMS], help='of recipes; all if none is given')
    p.add_argument('--iterations', type=int, default=24, help='per task')
    args = p.parse_args()
    equal = []
    for name in args.names:
        try: equal.append(one(name, args.iterations))
        except RuntimeError as e: equal.append(print(f'{name}: FAILED: {e}', flush=True))
    sys.exit(not all(equal))
