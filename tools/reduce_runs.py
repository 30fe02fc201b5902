"""Leave fewer experts in finished runs by every rule of `rewrites.rules.REWRITES`, without and with recovery.

    python tools/reduce_runs.py shared runs/shared/*          # adapters trained with experts.shared_init=true
    python tools/reduce_runs.py own runs/study/moe-seed*      # the others: rules that need a common start are left out

One row is kept as soon as it is known."""
import argparse
from pathlib import Path
import torch
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.rewrites.reduce import reductions
from moe_merge_nb.rewrites.rules import REWRITES
from moe_merge_nb.run.reproduce import stream_of
from moe_merge_nb.run.share import load
from moe_merge_nb.safe.provenance import provenance

SHARED_ONLY = ('task_arithmetic', 'ties', 'dare_ties', 'doge', 'doge_relative')
OUT = Path(__file__).parents[1]/'moe_merge_nb'/'data'/'measured'/'reductions.csv'

def reduced(run: str, a: argparse.Namespace):
    "Every rule at every budget, for one run."
    config, shared = load_result(run).config, load(run)
    names = a.rules or [r for r in REWRITES if a.init == 'shared' or r not in SHARED_ONLY]
    reductions(
        shared.model,
        shared.tokenizer,
        stream_of(config),
        rules={n: REWRITES[n] for n in names},
        budgets=a.budgets,
        file=a.out,
        iterations=a.recover,
        init=a.init,
        seed=config['seed'],
        commit=config.get('commit'),
        rule_commit=provenance()['commit'],
    )

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('init', choices=['shared', 'own'], help='how the experts of these runs began')
    p.add_argument('runs', nargs='+', help='run directories')
    p.add_argument('--rules', nargs='+', choices=list(REWRITES), help='default: all that can work with these runs')
    p.add_argument('--budgets', nargs='+', type=int, default=[16, 11, 6, 3], help='experts per block')
    p.add_argument('--recover', type=int, default=55, help='iterations of recovery, 0: none')
    p.add_argument('--out', default=OUT)
    a = p.parse_args()
    torch.set_num_threads(1)
    for run in a.runs: reduced(run, a)
