"""How the baselines' settings were chosen: data seed 50, method seed 0, the first five tasks, one run a value; a row of CSV per run.

usage: tools/tune_baselines.py [OUT.csv]    (about a minute or two a row on one core; rows that are there are kept)
"""
import csv, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from moe_merge_nb.baselines.methods import TRAIN, method
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.baselines.icarl import ICaRL
from moe_merge_nb.learn.loop import run
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.learn.results import accuracy_matrix
from moe_merge_nb.streams.tasks import first
from moe_merge_nb.baselines.wise_ft import WiSEFT
from moe_merge_nb.baselines.zscl import ZSCL

TRIED = [('finetune', lr, None) for lr in (5e-4, 2e-4)] \
      + [('lwf', lr, LwF(w)) for lr, w in ((5e-4, .3), (5e-4, 1.), (5e-4, 3.), (2e-4, 1.), (2e-4, 3.))] \
      + [('wise_ft', lr, WiSEFT(a)) for lr, a in ((5e-4, .3), (5e-4, .5), (5e-4, .8), (2e-4, .5))] \
      + [('zscl', lr, ZSCL(w)) for lr, w in ((5e-4, .3), (5e-4, 1.), (5e-4, 4.), (2e-4, .3))] \
      + [('icarl', lr, b) for lr, b in ((5e-4, ICaRL()), (5e-4, ICaRL(weight=0.)), (2e-4, ICaRL()))]
HEAD = ['method', 'lr', 'settings', 'Transfer', 'Average', 'Last', 'diagonal']

def row(name, lr, baseline, stream):
    "One run as a row of the table"
    A = accuracy_matrix(run(stream, method(name, train=replace(TRAIN, lr=lr), baseline=baseline), seed=0, progress=False))
    return [name, lr, str(baseline), *(round(x, 2) for x in (*mtil_metrics(A)[:3], np.diag(A).mean()))]

if __name__ == '__main__':
    out = Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/tune_baselines.csv')
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(r[:3]) for r in csv.reader(out.open())} if out.exists() else set()
    stream = first(mini(data_seed=50), 5)
    for name, lr, baseline in TRIED:
        if (name, str(lr), str(baseline)) in done: continue
        new = row(name, lr, baseline, stream)
        with out.open('a', newline='') as f: csv.writer(f).writerows([new] if done or out.stat().st_size else [HEAD, new])
        print(*new, flush=True)
