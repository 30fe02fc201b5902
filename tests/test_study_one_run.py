"""The range of one run, against a formula written out and against runs that are drawn."""
from dataclasses import replace
import numpy as np
from scipy import stats
from moe_merge_nb.study.measured import known_runs, measured
from moe_merge_nb.study.one_run import beside, prediction_interval, ranges, same_kind


def test_the_interval_is_students():
    a = np.array([90., 91, 92, 95, 89])
    low, high = prediction_interval(a)
    half = 2.7764451 * a.std(ddof=1) * 1.2**.5
    np.testing.assert_allclose([low, high], [a.mean() - half, a.mean() + half], rtol=1e-6)
    assert np.isnan(prediction_interval(a[:1])).all()


def test_19_of_20_further_runs_fall_inside():
    rng = np.random.default_rng(0)
    draws = rng.normal(80, 2, (4000, 6))
    inside = [low < new < high for *known, new in draws for low, high in [prediction_interval(np.array(known))]]
    assert abs(np.mean(inside) - .95) < .012


def test_a_run_without_spread_may_still_differ_by_a_tenth():
    np.testing.assert_allclose(prediction_interval(np.full(5, 44.8)), (44.7, 44.9))


def test_only_runs_of_the_same_settings_are_compared():
    mine = next(r for r in measured('demo') if r.config['method'] == 'moe')
    alike = [r for r in measured() if same_kind(mine, r)]
    assert len(alike) == 5 and {r.config['method'] for r in alike} == {'moe'}
    longer = replace(mine, config={**mine.config, 'train': {**mine.config['train'], 'iterations': 151}})
    assert ranges([longer], measured()).empty


def test_what_is_outside_is_marked():
    mine = next(r for r in measured('demo') if r.config['method'] == 'moe')
    better = replace(mine, matrix=mine.matrix.assign(accuracy=mine.matrix.accuracy + 5))
    assert not ranges([better], measured()).inside.any()
    assert beside(ranges([better], measured())).map(lambda s: s.endswith(' !')).all(axis=None)


def test_a_run_that_says_more_is_of_the_same_kind_both_ways():
    of_then = next(r for r in measured('demo') if r.config['method'] == 'moe')
    of_now = next(r for r in measured('machines') if r.config['method'] == 'moe')
    assert len(of_now.config['experts']) > len(of_then.config['experts'])
    assert same_kind(of_then, of_now) and same_kind(of_now, of_then)
    other = replace(of_now, config={**of_now.config, 'experts': {**of_now.config['experts'], 'rank': 8}})
    assert not same_kind(of_then, other) and not same_kind(other, of_then)


def test_one_run_is_compared_with_runs_of_two_processors():
    mine = next(r for r in measured('demo') if r.config['method'] == 'moe_merge')
    alike = [r for r in known_runs() if same_kind(mine, r)]
    seeds = sorted(r.config['seed'] for r in alike)
    assert seeds == sorted(2*[0, 100, 101, 102, 103, 104])
    assert sum('AVX2' in (r.config.get('processor') or '') for r in alike) == 6
