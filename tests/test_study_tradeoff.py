import pandas as pd
from moe_merge_nb.study.tradeoff import *


def test_in_training_pairs_by_seed():
    from moe_merge_nb.learn.results import example_result
    def one(method, seed, **merge):
        r = example_result(method, seed)
        r.config['merge'] = merge or None
        return r
    some = [one('moe', s) for s in range(3)]
    some += [one('moe_merge', s, combine='pkg.ties', align=False) for s in range(3)]
    some += [one('moe_merge', s, combine='mean', align=True) for s in range(2)]
    t = in_training(some)
    assert list(t.index) == ['ties', 'mean (aligned)'] and t['Last', 'n'].tolist() == [3, 2]
    assert (t['Average', 'low'] < t['Average', 'mean']).all()
