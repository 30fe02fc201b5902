import numpy as np, pandas as pd, pytest
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.study.study import *

def made(method='moe', seed=0, data_seed=0, order=1, learned=0., forgotten=0., **config):
    r = example_result('moe', seed + 10*data_seed + 100*order)
    after, task = (r.matrix[c].map(r.config['tasks'].index) for c in ('after', 'task'))
    r.matrix['accuracy'] += learned*(after >= task) - forgotten*(after > task)
    r.config.update(method=method, seed=seed, data_seed=data_seed, order=order, **config)
    return r


def test_last_is_learned_minus_forgotten():
    a, b = measures(made()), measures(made(learned=2., forgotten=1.))
    assert np.allclose(b.Last, b.Learned - b.Forgotten)
    assert np.allclose(b.Learned - a.Learned, 2)
    assert np.allclose(b.Forgotten - a.Forgotten, .75) # 3 of the 4 tasks had a successor
    assert (a.Transfer == b.Transfer).all()


def test_differences_are_those_that_were_put_in():
    runs_of = lambda seeds, method, **kw: [made(method, seed=s, **kw) for s in seeds]
    some = runs_of(range(3), 'moe') + runs_of(range(1, 4), 'better', learned=2.)
    some += runs_of(range(3), 'leaky', forgotten=1.)
    d = differences(some, 'moe').set_index(['setting', 'selector', 'metric'])
    assert sorted(d.loc[('better', 'oracle', 'Last')].seed) == [1, 2] # cells of both
    assert np.allclose(d.loc[('better', 'gaussian', 'Learned')].difference, 2)
    assert np.allclose(d.loc[('better', 'oracle', 'Forgotten')].difference, 0)
    assert np.allclose(d.loc[('leaky', 'oracle', 'Last')].difference, -.75)


def test_only_known_references_with_common_cells_are_paired():
    with pytest.raises(ValueError, match="reference is 'none'.*'moe'"): differences([made()], 'none')
    with pytest.raises(ValueError, match="'moe_merge' and 'moe' have no cell"):
        differences([made(), made('moe_merge', seed=1)], 'moe')
    with pytest.raises(ValueError, match='Two runs agree'): cells([made(), made()])
    assert len(cells([made(lr=1), made(lr=2)], lambda r: ('moe', r.config['lr']))) == 2*2*5


def test_intervals_are_those_of_the_textbook():
    x = [1., 2., 4., 5.]
    i = interval(x)
    assert (i.mean, i.n) == (3, 4) and np.isclose(i.sd, np.std(x, ddof=1))
    assert np.isclose(i.high - 3, 3.182446*i.sd/2) # t with 3 degrees of freedom
    assert interval([1, 3, 3, 7], [0, 0, 1, 1])[:4] == interval([2, 5])[:4]
    assert np.isnan(interval([1.])[2:]).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match='no values'): interval([])


def test_effects_agree_with_paired_differences():
    from moe_merge_nb.study.tables import paired_difference
    a = [made(seed=s) for s in range(4)]
    b = [made('moe_merge', seed=s, learned=s/2, forgotten=.1*s*s) for s in range(4)]
    e = effects(a + b, 'moe').set_index(['selector', 'metric'])
    for metric in ('Transfer', 'Average', 'Last'):
        p = paired_difference(a, b, metric, 'gaussian')
        assert np.allclose(e.loc[('gaussian', metric), ['mean', 'se', 'n']].astype(float), p[:3])
    assert e.low.notna().all()
    assert (e.clusters == 1).all() and e.low_clustered.isna().all() # one data seed says nothing about others


def test_forest_plot_draws_what_the_rows_say():
    import matplotlib.pyplot as plt
    gains = {'moe': 0, 'moe_merge': 1, 'rail': -1}
    some = [made(m, seed=s, data_seed=s % 2, learned=x*s) for s in range(4) for m, x in gains.items()]
    e = effects([*some, made('adapter', learned=9.)], 'moe')
    ax = plot_effects(e[(e.selector == 'oracle') & (e.metric == 'Learned')])
    assert [l.get_text() for l in ax.get_yticklabels()] == ['moe_merge', 'rail', 'adapter']
    assert [t.get_text() for t in ax.texts] == ['4', '4', '1', 'n']
    dots = [l.get_xdata()[0] for l in ax.lines if l.get_marker() == 'o']
    assert np.allclose(dots, [1.5, -1.5, 9]) and len(ax.lines) == 1 + 3 + 2*2 # a single pair has no interval
    plt.close()
    with pytest.raises(ValueError, match='one selector'): plot_effects(e)


def test_parts_add_up_and_find_their_factor():
    import itertools
    cases = list(itertools.product([100, 101], range(4), [1, 2]))
    rows = pd.DataFrame(cases, columns=['seed', 'data_seed', 'order'])
    effect = 3.*(rows.seed == 101) + rows.data_seed
    p = variance_parts(rows.assign(difference=effect))
    assert np.allclose(p.ss, [16*1.5**2, 4*(1.5**2 + .5**2)*2, 0, 0]) and p.df.tolist() == [1, 3, 1, 10]
    noisy = rows.assign(difference=effect + np.random.default_rng(0).normal(size=16))
    q = variance_parts(noisy)
    assert np.isclose(q.share.sum(), 1) and np.isclose(q.by_chance.sum(), 1)
    assert np.isclose(q.ss.sum(), 15*noisy.difference.var())
    assert q.p['seed'] < .001 < .05 < q.p['order']


def test_numbers_of_pairs_are_those_of_the_tables():
    known = {.2: 199, .3: 90, .5: 34, .8: 15, 1: 10} # G*Power, R's power.t.test(type = 'paired')
    assert {d: seeds_needed(1, d) for d in known} == known
    assert seeds_needed(1, .5, power=.9) == 44 and seeds_needed(2, -1) == 34 and seeds_needed(0, 1) == 2
    assert np.isclose(power_of(.5, 1, 34), .8078, atol=2e-4) and np.isclose(power_of(0, 1, 10), .05)
    for n in (3, 16, 60):
        assert seeds_needed(1, detectable(1, n)*1.0001) == n
    assert np.isclose(detectable(2, 16), 2*detectable(1, 16)) and np.isclose(detectable(1, 10), .996, atol=2e-3)
