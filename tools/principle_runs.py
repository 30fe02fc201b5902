"""Figure 1: train the first tasks of MTIL-mini with and without merging, and measure at every merge (see moe_merge_nb/principle.py).

    python tools/principle_runs.py                    # seeds 100 ... 104, about a minute each on one core
    python tools/principle_runs.py --seeds 0 --tasks 1 --out principle_try.csv.gz

What is in the file is kept; a seed and method that is missing is trained, and added when it is through. One process per file."""
import argparse, gzip, io
from pathlib import Path
import pandas as pd
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.run.config import FRESH
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.safe.files import replacing
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.study.watch import watched
from moe_merge_nb.safe.provenance import provenance
from moe_merge_nb.streams.tasks import first

OUT = Path(__file__).parents[1]/'moe_merge_nb'/'data'/'measured'/'principle.csv.gz'
COLUMNS = ['seed', 'method', 'task', 'iteration', 'tower', 'block', 'measure', 'who', 'expert', 'value', 'commit', 'torch']

def write(table, path):
    "The same bytes whenever it is written."
    with replacing(path) as part, open(part, 'wb') as f, gzip.GzipFile(fileobj=f, mode='wb', filename='', mtime=0) as z:
        table[COLUMNS].to_csv(io.TextIOWrapper(z, encoding='utf-8', newline=''), index=False, float_format='%.4g', lineterminator='\n')

def stored(path):
    "What is there."
    return pd.read_csv(path, keep_default_na=False, dtype=dict(commit=str)) if path.is_file() else pd.DataFrame(columns=COLUMNS)

def measure(seed, name, n_tasks, about):
    "All rows of one run."
    rows, _ = watched(first(mini(seed), n_tasks), method(name), seed, load_clip(), Merge())
    return pd.DataFrame(rows).assign(seed=seed, method=name, commit=about['commit'], torch=about['torch'])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=FRESH, help='of the method and of the data')
    p.add_argument('--tasks', type=int, default=2, help='how many tasks of the stream')
    p.add_argument('--out', type=Path, default=OUT)
    a = p.parse_args()
    torch.set_num_threads(1)
    about = provenance()                                                        # of the code that has been read
    for seed in a.seeds:
        for name in ('moe', 'moe_merge'):
            table = stored(a.out)
            if ((table.seed == seed) & (table.method == name)).any(): continue
            rows = measure(seed, name, a.tasks, about)
            write(pd.concat([t for t in (table, rows) if len(t)]).sort_values(['seed', 'method'], kind='stable'), a.out)
            print(f'seed {seed}, {name}: {len(rows)} rows', flush=True)
