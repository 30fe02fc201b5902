"""Store the runs of `make measure` with the package: what README, figure notebooks and the study show.

    python tools/pack_runs.py            # what is in runs/; experiments that were not run stay as they are stored
    python tools/pack_runs.py FOLDER     # the same with another folder for runs/"""
import sys
from dataclasses import replace
from pathlib import Path
import pandas as pd
from moe_merge_nb.learn.pack import load_results, pack
from moe_merge_nb.learn.results import Result
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.study.measured import CHOICES, FIELDS, FOLDER, MADE, STUDY, ordered, store

FULL = {  # with the experts of a few runs
    'mini': ['study', 'baselines'],
    'demo': ['demo'],
}
OTHERS = {
    'combine': ['shared', 'combine', 'combine_aligned'],
    'rates': ['rates'],
    'machines': ['machines'],
    'photos': ['photos', 'photos_bounds'],
    'photos_rates': ['photos_rates', 'photos_rates_full'],
}

def placeless(run: Result) -> Result:
    "Without the folder above its images."
    made = run.config.get('stream_made') or {}
    if not made.get('root'): return run
    return replace(run, config={**run.config, 'stream_made': {**made, 'root': Path(made['root']).name}})

def is_finished(run: Result) -> bool:
    "Did it get to its end?"
    n = len(run.config['tasks'])
    return all(len(rows) == n**2 for _, rows in run.matrix.groupby('selector'))

def finished(folders: list[Path]) -> list[Result]:
    "The runs that did, in these folders."
    there = [f for f in folders if any(f.rglob('config.json'))]
    return [r for f in there for r in load_results([f]) if is_finished(r)]

def closed(folders: list[Path]) -> pd.DataFrame:
    "Of each run and tower: the share of selections that were lost, because gates were 0 in single precision."
    rows = []
    for d in sorted(c.parent for f in folders for c in f.rglob('config.json')):
        r = load_result(d)
        if not is_finished(r) or not len(r.usage): continue
        n = r.usage.groupby(['tower', 'after', 'block'])['count'].sum()
        all_of = n.groupby(['tower', 'after']).transform('max')
        share = 1 - n.groupby('tower').sum() / all_of.groupby('tower').sum()
        run = {'method': r.config['method'], 'data_seed': r.config['data_seed'], 'lr': r.config['train']['lr']}
        rows += [{**run, 'tower': tower, 'share': round(x, 6)} for tower, x in share.items()]
    return pd.DataFrame(rows)

def stored(name: str, folders: list[Path]) -> list[Path]:
    "The files that were made."
    if name in FULL: return store(folders, name) if folders else []
    runs = [placeless(r) for r in finished(folders)]
    if name == 'rates' and runs: closed(folders).to_csv(FOLDER/'rates_closed.csv', index=False)
    return [pack(ordered(runs), FOLDER/f'{name}.csv.gz', (*FIELDS, *CHOICES, *MADE))] if runs else []

if __name__ == '__main__':
    root = Path(sys.argv[1] if len(sys.argv) > 1 else 'runs')
    for name, experiments in (FULL | STUDY | OTHERS).items():
        made = stored(name, [root/e for e in experiments if (root/e).is_dir()])
        print(*(made or [f'{name}: no runs']), sep='\n')
