import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from moe_merge_nb.learn.results import accuracy_matrix, example_result, summary
from moe_merge_nb.study.tables import paired_difference, per_task, plot_paired, published, statistics, table


def test_standard_error_is_over_seeds():
    from moe_merge_nb.learn.metrics import mtil_metrics
    runs = [example_result('moe', seed) for seed in range(3)]
    last = [mtil_metrics(accuracy_matrix(r, 'oracle')).last for r in runs]
    s = statistics(runs).loc[('moe', 'oracle'), 'Last']
    assert s['n'] == 3
    torch.testing.assert_close([s['mean'], s['se']], [np.mean(last), np.std(last, ddof=1)/3**.5])
    assert table(runs[:1]).Last.iloc[0].endswith('(1)') and '±' not in table(runs[:1]).Last.iloc[0]


def test_per_task_has_the_metric_of_each_task():
    runs = [example_result('moe', seed) for seed in range(2)]
    df = per_task(runs, 'last', 'gaussian')
    assert list(df.columns) == [*runs[0].config['tasks'], 'mean']
    assert df.loc['moe', 'DTD'] == pytest.approx(np.mean([accuracy_matrix(r, 'gaussian')[-1, 3] for r in runs]))
    assert df.loc['moe', 'mean'] == pytest.approx(statistics(runs).loc[('moe', 'gaussian'), ('Last', 'mean')])


def test_paired_plot_shows_every_pair_and_the_mean():
    rows = pd.DataFrame({'metric': ['Last']*3 + ['Average'], 'difference': [1., 2, 6, -1]})
    ax = plot_paired(rows)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['Last (n = 3)', 'Average (n = 1)']
    data = [list(l.get_xdata()) for l in ax.lines]
    assert [1, 2, 6] in data and [3] in data and [-1] in data
    plt.close('all')


def test_published_means_are_the_means_of_their_tasks():
    p = published()
    tasks = p.loc[:, 'Aircraft':'SUN397']
    whole = tasks.notna().sum(axis=1) == np.where(p.metric == 'transfer', 10, 11)
    assert whole.sum() > 30 and p.source.notna().all() and p['mean'].notna().all()
    off = (tasks.mean(axis=1) - p['mean']).abs()[whole]
    assert off.max() < .16, p[whole].assign(off=off).nlargest(3, 'off')


def test_published_can_be_filtered():
    assert set(published('full-shot', 'II', 'last').method) >= {'ZSCL', 'MoE-Adapters'}
    with pytest.raises(ValueError, match="order='3': published are"): published(order='3')
