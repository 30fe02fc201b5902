"""Figure 1: train the first tasks of MTIL-mini with and without merging, and measure at every merge.

    python tools/principle_runs.py                    # seeds 100 ... 104, about a minute each on one core
    python tools/principle_runs.py --seeds 0 --tasks 1 --out principle_try.csv.gz

What is measured: nbs/11_study/07_watch.ipynb. What is in the file is kept; a seed and method that is missing is
trained, and added when it is through. One process per file."""
import argparse
import gzip
import io
from pathlib import Path
import pandas as pd
import torch
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.run.config import FRESH
from moe_merge_nb.safe.files import replacing
from moe_merge_nb.safe.provenance import provenance
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import first
from moe_merge_nb.study.watch import watched

OUT = Path(__file__).parents[1]/'moe_merge_nb'/'data'/'measured'/'principle.csv.gz'
COLUMNS = [
    *('seed', 'method', 'task', 'iteration', 'tower', 'block'),
    *('measure', 'who', 'expert', 'value', 'commit', 'torch'),
]

def write(table: pd.DataFrame, path: Path):
    "The same bytes whenever it is written."
    with replacing(path) as part, open(part, 'wb') as f:
        with gzip.GzipFile(fileobj=f, mode='wb', filename='', mtime=0) as z:
            text = io.TextIOWrapper(z, encoding='utf-8', newline='')
            table[COLUMNS].to_csv(text, index=False, float_format='%.4g', lineterminator='\n')

def stored(path: Path) -> pd.DataFrame:
    "What is there."
    if not path.is_file(): return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, keep_default_na=False, dtype=dict(commit=str))

def measure(
    seed: int,  # of the method and of the data
    name: str,  # of the method
    n_tasks: int,
    about: dict,  # commit and torch
) -> pd.DataFrame:
    "All rows of one run."
    stream = first(mini(seed), n_tasks)
    rows, _ = watched(stream, method(name), seed=seed, backbone=load_clip(), rule=Merge())
    return pd.DataFrame(rows).assign(seed=seed, method=name, commit=about['commit'], torch=about['torch'])

def add(rows: pd.DataFrame, path: Path):
    "To what is there, in order."
    both = [t for t in (stored(path), rows) if len(t)]
    write(pd.concat(both).sort_values(['seed', 'method'], kind='stable'), path)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=FRESH, help='of the method and of the data')
    p.add_argument('--tasks', type=int, default=2, help='how many tasks of the stream')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(1)
    about = provenance()  # of the code that has been read
    for seed in a.seeds:
        for name in ('moe', 'moe_merge'):
            table = stored(a.out)
            if ((table.seed == seed) & (table.method == name)).any(): continue
            rows = measure(seed, name, a.tasks, about)
            add(rows, a.out)
            print(f'seed {seed}, {name}: {len(rows)} rows', flush=True)
