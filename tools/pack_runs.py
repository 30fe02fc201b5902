"""Store the runs of `make measure` with the package: the measurements that README, figure notebooks and the study show.

    python tools/pack_runs.py            # what is in runs/; experiments that were not run stay as they are stored
    python tools/pack_runs.py FOLDER     # the same with another folder for runs/"""
import sys
from pathlib import Path
from moe_merge_nb.study.measured import CHOICES, FIELDS, FOLDER, MADE, STUDY, ordered, store
from moe_merge_nb.learn.pack import load_results, pack

FULL = {'mini': ['study', 'baselines'], 'demo': ['demo']}                                        # with the experts of a few runs
OTHERS = {'combine': ['shared', 'combine', 'combine_aligned']}

def finished(folders:list[Path])->list:
    "The runs that got to their end."
    runs = [r for f in folders if any(f.rglob('config.json')) for r in load_results([f])]
    return [r for r in runs if all(len(g) == len(r.config['tasks'])**2 for _, g in r.matrix.groupby('selector'))]

if __name__ == '__main__':
    root = Path(sys.argv[1] if len(sys.argv) > 1 else 'runs')
    for name, experiments in (FULL | STUDY | OTHERS).items():
        there = [f for e in experiments if (f := root/e).is_dir()]
        runs = there if name in FULL else finished(there)
        if not runs: print(f'{name}: no runs'); continue
        made = store(runs, name) if name in FULL else [pack(ordered(runs), FOLDER/f'{name}.csv.gz', (*FIELDS, *CHOICES, *MADE))]
        print(*made, sep='\n')
