import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import rgb_to_hsv, to_rgb
from moe_merge_nb.study.plots import (
    fixed_counts, plot_confusion, plot_curves, plot_fixed, plot_matrix, plot_merges, plot_usage)
from moe_merge_nb.learn.results import accuracy_matrix, example_result


def test_matrix_plot_shows_every_number_once():
    A = np.arange(16.).reshape(4, 4)
    fig, ax = plt.subplots()
    assert plot_matrix(A, list('abcd'), ax) is ax
    assert sorted(float(t.get_text()) for t in ax.texts) == sorted(A.ravel())
    assert len(ax.patches) == 4 # the diagonal
    with pytest.raises(ValueError, match='5 tasks'): plot_matrix(A, list('abcde'))
    plt.close('all')


def test_curves_have_a_dashed_and_a_solid_part_and_a_dot():
    r = example_result()
    ax = plot_curves(r.matrix, 'gaussian', r.config['tasks'])
    A = accuracy_matrix(r, 'gaussian')
    assert len(ax.lines) == 12
    dashed, solid, dot = (line.get_ydata().tolist() for line in ax.lines[6:9]) # the third task
    assert dashed == A[:3, 2].tolist()
    assert solid == A[2:, 2].tolist()
    assert dot == [A[2, 2]]
    with pytest.raises(ValueError, match='gaussian'): plot_curves(r.matrix, 'none', r.config['tasks'])
    plt.close('all')


def test_fixed_experts_are_a_union():
    image = [('a', 0, 3), ('a', 0, 5), ('b', 0, 5), ('b', 0, 1), ('a', 1, 0), ('a', 1, 1), ('b', 1, 1), ('b', 1, 0)]
    rows = pd.DataFrame([*image, ('a', 0, 7)], columns=['after', 'block', 'expert'])
    rows = rows.assign(tower=['image']*8 + ['text'])
    assert fixed_counts(rows, ['a', 'b'], 'image').to_numpy().tolist() == [[2, 2], [3, 2]]
    ax = plot_fixed(rows, ['a', 'b'], 'image')
    assert [t.get_text() for t in ax.texts] == ['2', '2', '3', '2'] and 'block' in ax.get_xlabel()
    assert [t.get_text() for t in plot_fixed([rows, rows], ['a', 'b'], 'text').texts] == ['1.0', '1.0']
    plt.close('all')


def test_each_merge_has_two_sources_and_a_target():
    r = example_result('moe_merge')
    n = sum(e['kind'] == 'merge' and e['tower'] == 'text' for e in r.events)
    ax = plot_merges(r.events, r.config['tasks'], 'text', 100)
    dots = [c for c in ax.collections if hasattr(c, 'get_sizes') and len(c.get_sizes())]
    points = [len(c.get_offsets()) for c in dots]
    assert points.count(2) == n and points.count(1) == n > 0
    with pytest.raises(ValueError, match='no merges'):
        plot_merges(example_result('moe').events, r.config['tasks'], 'text')
    plt.close('all')


def test_confusion_outlines_what_is_right():
    rows = pd.DataFrame([('a', 'a', 30), ('a', 'CLIP', 10), ('b', 'CLIP', 40)], columns=['task', 'selected', 'count'])
    rows = rows.assign(selector='s', after='a')
    ax = plot_confusion(rows, 's', ['a', 'b'], 'a')
    assert [t.get_text() for t in ax.texts if t.get_text()] == ['75', '25', '100']
    assert [p.get_xy() for p in ax.patches] == [(0, 0), (2, 1)] # b is not learned: plain CLIP is right
    with pytest.raises(ValueError, match="after 'b'"): plot_confusion(rows, 's', ['a', 'b'])
    plt.close('all')


def test_the_words_under_a_plot_of_merges_name_the_colours_that_are_drawn():
    r = example_result()
    ax = plot_merges(r.events, r.config['tasks'], 'image')
    dots = [c for c in ax.collections if isinstance(c, PathCollection)]
    marks = {int(c.get_sizes()[0]): to_rgb(c.get_facecolor()[0]) for c in dots}
    hues = {size: 360 * rgb_to_hsv(rgb)[0] for size, rgb in marks.items()}
    assert 190 < hues[7] < 250 and 15 < hues[16] < 45                               # blue, orange
    assert 'blue: sources, orange: overwritten' in ax.get_xlabel()
    plt.close('all')


def test_plots_draw_on_the_axes_they_are_given_and_nowhere_else():
    r = example_result()
    t, before = r.config['tasks'], dict(plt.rcParams)
    plt.close('all')
    fig, axes = plt.subplots(1, 6)
    drawn = [
        plot_matrix(accuracy_matrix(r, 'oracle'), t, axes[0]),
        plot_curves(r.matrix, 'oracle', t, axes[1]),
        plot_fixed(r.fixed, t, 'text', axes[2]),
        plot_usage(r.usage, t[0], 'text', axes[3]),
        plot_merges(r.events, t, 'text', ax=axes[4]),
        plot_confusion(r.selection, 'oracle', t, ax=axes[5]),
    ]
    assert all(a is b for a, b in zip(drawn, axes))
    assert len(plt.get_fignums()) == 1 and dict(plt.rcParams) == before
    assert all(a.get_xlabel() and a.get_ylabel() for a in axes)
    plt.close('all')
