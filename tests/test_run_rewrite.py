import tempfile
import pytest, torch
from moe_merge_nb.run.rewrite import *
from moe_merge_nb.rewrites.reduce import load_banks
from moe_merge_nb.rewrites.rules import REWRITES, SPLITS
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed


TINY = (
    'stream=toy',
    'stream.n_tasks=2',
    'stream.n_test=6',
    'stream.n_train=12',
    'model=toy',
    'train.iterations=4',
    'train.warmup=1',
    'train.batch=8',
    'experts.n_experts=4',
    'experts.rank=2',
    'selectors=[oracle]',
    'experts.shared_init=true')
REFUSED = (
    dict(rule='fine_grained', budget=2),
    dict(parts=2),
    dict(budget=0),
    dict(budget=5),
    dict(budget=2.5),
    dict(budget=2, recovery=-1),
    dict(budget=2, rule='nope'))

def test_a_run_is_made_smaller_and_saved():
    with tempfile.TemporaryDirectory() as d:
        result = job(composed(*TINY), d, progress=False)
        for name in REWRITES:
            table, out = rewrite_run(d, name, 2)
            small, said = load_banks(out/'banks.safetensors')
            assert list(table.index) == [*result.config['tasks'], 'mean'] and said['rule'] == name
            if 'prune' not in name: assert sum(len(b.states) for b in small) == 2 * len(small)
        row = result.matrix[result.matrix.after == result.config['tasks'][-1]].accuracy
        torch.testing.assert_close(torch.tensor(table.before[:2].to_list()), torch.tensor(row.to_list()))
        for name in SPLITS:
            table, out = rewrite_run(d, name, parts=2)
            if name != 'select_parts': torch.testing.assert_close(table.after.to_list(), table.before.to_list())
        for bad in REFUSED:
            with pytest.raises(ValueError, match='choose'): rewrite_run(d, **{'rule': 'average', **bad})
        with pytest.raises(FileNotFoundError): rewrite_run(f'{d}/nothing', 'average', 2)
