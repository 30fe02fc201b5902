"""Run one list of runs at a commit and here, on this machine, and compare what they leave, byte for byte.

    python tools/golden.py f3965f7            # everything, about six minutes a tree; what the commit gave is kept
    python tools/golden.py f3965f7 --only moe # the jobs whose name begins so

Compared: accuracy matrix, selections, usage, fixed experts, events, adapters and rewritten banks. Not compared:
timings, provenance, and the fields by which a run is recognised."""
import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT/'.cache'/'golden'
SHORT = ['train.iterations=30', 'train.warmup=3', 'stream._target_=three_tasks.three']
METHODS = ['moe', 'moe_merge', 'moe_warm', 'moe_copy', 'lwf', 'zscl', 'icarl', 'wise_ft', 'rail']
RUNS = {f'{method}-{seed}': [f'method={method}', f'seed={seed}'] for method in METHODS for seed in (0, 1)} | {
    'align': ['method=moe_merge', 'merge.align=true'],
    'fit': ['method=moe_merge', 'merge.fit=true'],
    'settle': ['method=moe', 'freeze.settle=0.5'],
    'shared_blocks': ['method=moe', 'experts.shared_blocks=1'],
    'all': ['method=moe', 'classes=[task,all]'],
    'shared_init': ['method=moe', 'experts.shared_init=true'],
    'top_p': ['method=moe_merge', 'experts.gate=top_p'],
}
SAME = {'place': 'column_to_expert', 'always': 'always_on'} # what was renamed
NEW = ('frozen',) # what a bank did not hold then
TABLES = ['matrix.csv', 'selection.csv', 'usage.csv', 'fixed.csv', 'events.jsonl']
THREE = '''"The first three tasks of the miniature, wherever the package keeps it."
try: from moe_merge_nb.streams.mini import mini
except ImportError: from moe_merge_nb.mini import mini
try: from moe_merge_nb.streams.tasks import first
except ImportError: from moe_merge_nb.tasks import first

def three(**how):
    return first(mini(**how), 3)
'''


def found(*names: str):
    "The module of the package whose last name is the first of `names` that there is, in whatever folder it lies."
    import importlib
    import moe_merge_nb
    here = Path(moe_merge_nb.__file__).parent
    path = [p for name in names for p in here.rglob(f'{name}.py')][0]
    return importlib.import_module('.'.join(['moe_merge_nb', *path.relative_to(here).with_suffix('').parts]))


def entry(tree: Path) -> str:
    "The module of `moe-merge` in a tree."
    ini = ConfigParser(delimiters=['='])
    ini.read(tree/'settings.ini', encoding='utf-8')
    scripts = dict(s.split('=') for s in shlex.split(ini['DEFAULT']['console_scripts']))
    return scripts['moe-merge'].split(':')[0]


def digest(tensors: dict) -> str:
    "SHA-256 over names, shapes and bytes."
    h = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        h.update(f'{name} {t.dtype} {tuple(t.shape)}'.encode())
        h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def facts(directory: Path) -> dict:
    "What a run left."
    from safetensors.torch import load_file
    left = {name: hashlib.sha256((directory/name).read_bytes()).hexdigest() for name in TABLES}
    adapters = directory/'adapters.safetensors'
    return left | ({'adapters': digest(load_file(adapters))} if adapters.is_file() else {})


def run_one(name: str, main) -> dict:
    "One command of `moe-merge`."
    sys.argv = ['moe-merge', *SHORT, *RUNS[name], f'hydra.run.dir={name}']
    sys.stderr.flush()
    main()
    return facts(Path(name))


def rewritten(rule: str, source: str) -> dict:
    "What a rule makes of the adapters of a run."
    import torch
    from dataclasses import fields
    from three_tasks import three
    command, bank, reduce = found('rewrite', 'command'), found('bank'), found('reduce')
    shared, stream = found('share').load(source), three()
    numbers = dict(parts=2) if rule in found_splits() else dict(budget=11)
    small = command.changed(shared.model, shared.tokenizer, stream, rule, **numbers)
    tensors = {}
    for i, b in enumerate(bank.banks(small)):
        values = {SAME.get(f.name, f.name): getattr(b, f.name) for f in fields(b) if f.name not in NEW}
        tensors |= {f'{i}.{k}': v for k, v in values.items() if isinstance(v, torch.Tensor)}
        tensors |= {f'{i}.{e}.{k}': v for e, s in enumerate(b.states) for k, v in s.items()}
    right = reduce.last(small, shared.tokenizer, stream)
    return {'banks': digest(tensors), 'last': json.dumps(right)}


def rules() -> dict[str, str]:
    "Every rewrite, and the run it is applied to."
    together = ('task_arithmetic', 'ties', 'dare_ties', 'doge', 'doge_relative')
    every = [*found('rules', 'config').REWRITES, *found_splits()]
    return {r: 'shared_init' if r in together else 'moe-0' for r in every}


def found_splits() -> dict:
    return found('rules', 'config').SPLITS


def child(module: str, out: Path, only: str):
    "All jobs of one tree, which is first on the path; one line of facts each."
    import importlib
    os.chdir(out)
    sys.path.insert(0, str(out))
    Path('three_tasks.py').write_text(THREE, encoding='utf-8')
    kept = Path('facts.json')
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    main = importlib.import_module(module).main
    for name in [n for n in RUNS if n.startswith(only) or n in ('moe-0', 'shared_init')]:
        if name not in known: known[name] = run_one(name, main)
        kept.write_text(json.dumps(known, indent=1))
    for rule, source in rules().items():
        name = f'rewrite {rule}'
        if name.startswith(only) and name not in known: known[name] = rewritten(rule, source)
        kept.write_text(json.dumps(known, indent=1))


def begin(tree: Path, out: Path, only: str) -> subprocess.Popen:
    "Run the jobs of `tree` in a process of their own."
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, __file__, '--child', entry(tree), str(out), '--only', only]
    with open(out/'log.txt', 'w') as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def compare(then: dict, now: dict, only: str) -> int:
    "Say what differs; how many jobs do."
    names = [n for n in then if n.startswith(only)]
    odd = [n for n in names if now.get(n) != then[n]]
    for n in odd:
        what = [k for k in then[n] if now.get(n, {}).get(k) != then[n][k]]
        print(f'{n}: another {", ".join(what)}')
    print(f'{len(names)} jobs compared, {len(odd)} differ')
    return len(odd)


def main(commit: str, only: str) -> int:
    git = ['git', '-C', str(ROOT)]
    sha = subprocess.run([*git, 'rev-parse', commit], check=True, capture_output=True, text=True).stdout.strip()
    then, now = KEPT/sha[:12], KEPT/'here'
    if not (then/'tree').is_dir():
        subprocess.run([*git, 'worktree', 'prune'], check=True)
        subprocess.run([*git, 'worktree', 'add', '--detach', str(then/'tree'), sha], check=True)
    subprocess.run(['rm', '-rf', str(now)], check=True)
    running = [begin(then/'tree', then/'runs', only), begin(ROOT, now, only)]
    codes = [p.wait() for p in running]
    if any(codes): print(f'exit codes {codes}: see {then/"runs"/"log.txt"} and {now/"log.txt"}')
    read = lambda p: json.loads((p/'facts.json').read_text())
    return 1 if any(codes) or compare(read(then/'runs'), read(now), only) else 0


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('commit', nargs='?', help='to compare with')
    p.add_argument('--only', default='', help='jobs whose name begins so')
    p.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: sys.exit(child(a.child[0], Path(a.child[1]).resolve(), a.only))
    sys.exit(main(a.commit, a.only))
