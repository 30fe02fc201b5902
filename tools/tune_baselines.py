"""How the baselines' settings were chosen: data seed 50, method seed 0, the first five tasks, one run a value; a row of
CSV per run.

    python tools/tune_baselines.py [OUT.csv]  # about a minute or two a row on one core; rows that are there are kept
"""
import argparse
import csv
from dataclasses import replace
from pathlib import Path
import numpy as np
from moe_merge_nb.baselines.icarl import ICaRL
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.baselines.methods import TRAIN, method
from moe_merge_nb.baselines.wise_ft import WiSEFT
from moe_merge_nb.baselines.zscl import ZSCL
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.learn.results import accuracy_matrix
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import Stream, first

TRIED = [
    ('finetune', 5e-4, None),
    ('finetune', 2e-4, None),
    ('lwf', 5e-4, LwF(.3)),
    ('lwf', 5e-4, LwF(1.)),
    ('lwf', 5e-4, LwF(3.)),
    ('lwf', 2e-4, LwF(1.)),
    ('lwf', 2e-4, LwF(3.)),
    ('wise_ft', 5e-4, WiSEFT(.3)),
    ('wise_ft', 5e-4, WiSEFT(.5)),
    ('wise_ft', 5e-4, WiSEFT(.8)),
    ('wise_ft', 2e-4, WiSEFT(.5)),
    ('zscl', 5e-4, ZSCL(.3)),
    ('zscl', 5e-4, ZSCL(1.)),
    ('zscl', 5e-4, ZSCL(4.)),
    ('zscl', 2e-4, ZSCL(.3)),
    ('icarl', 5e-4, ICaRL()),
    ('icarl', 5e-4, ICaRL(weight=0.)),
    ('icarl', 2e-4, ICaRL()),
]
HEAD = ['method', 'lr', 'settings', 'Transfer', 'Average', 'Last', 'diagonal']

def row(
    name: str,  # of the method
    lr: float,
    baseline: object,  # its settings
    stream: Stream,
) -> list:
    "One run as a row of the table."
    settings = method(name, train=replace(TRAIN, lr=lr), baseline=baseline)
    A = accuracy_matrix(run(stream, settings, seed=0, progress=False))
    numbers = *mtil_metrics(A)[:3], np.diag(A).mean()
    return [name, lr, str(baseline), *(round(x, 2) for x in numbers)]

def known(path: Path) -> set[tuple]:
    "The settings that have a row."
    if not path.exists(): return set()
    with path.open() as f: return {tuple(r[:3]) for r in csv.reader(f)}

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', nargs='?', type=Path, default=Path('runs/tune_baselines.csv'))
    out = p.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    done, stream = known(out), first(mini(data_seed=50), 5)
    for name, lr, baseline in TRIED:
        if (name, str(lr), str(baseline)) in done: continue
        new = row(name, lr, baseline, stream)
        with out.open('a', newline='') as f:
            csv.writer(f).writerows([new] if out.stat().st_size else [HEAD, new])
        print(*new, flush=True)
