"""Does load persist: what is counted per iteration, and how far the past tells the next iteration's load."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.sharded import load
from moe_merge_nb.sharded.load import PerIteration, covered, expectations, history, measure_load, rank_correlation
from moe_merge_nb.streams.tasks import toy_stream
from toys import toy_model

def invented(seed, tasks=2, iterations=3):
    "Rows as `record` makes them, of two blocks and four experts."
    places = [(t, i, b) for t in range(tasks) for i in range(1, iterations + 1) for b in range(2)]
    return pd.DataFrame([dict(seed=seed, task=t, iteration=i, block=b) | {str(e): 100*t + 10*i + b for e in range(4)}
                         for t, i, b in places])

def test_counts_of_every_iteration_add_up_to_those_of_the_task():
    (model, tokenizer), seen, totals = toy_model(n_experts=4, rank=2, top_k=2), PerIteration(), []
    for i, task in enumerate(toy_stream(2)):
        learner = train_task(model, task, i, tokenizer, Train(iterations=3, batch=4, warmup=1), callbacks=[seen])
        totals.append(learner.usage.counts)
    rows = pd.DataFrame(seen.rows)
    experts = [str(e) for e in range(4)]
    assert (rows[experts].sum(axis=1) == 2 * 4).all()                       # k for each image
    for (task, block), r in rows.groupby(['task', 'block']):
        assert r.iteration.tolist() == [1, 2, 3]
        assert r[experts].sum().tolist() == totals[task]['image', block].tolist()

def test_a_history_is_in_the_order_of_time_whatever_the_order_of_the_rows():
    x = history(invented(0).sample(frac=1, random_state=1))
    assert x.shape == (6, 2, 4) and (x[..., :1] == x).all()
    assert x[:, 0, 0].tolist() == [10, 20, 30, 110, 120, 130] and (x[:, 1] == x[:, 0] + 1).all()

def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (5, 9)), rng.integers(0, 4, (5, 9))
    want = [spearmanr(p, q).statistic for p, q in zip(a, b)]
    assert rank_correlation(a, b) == pytest.approx(want)

def test_covered_is_the_load_of_those_that_were_expected():
    assert covered(np.array([5., 4, 0, 1]), np.array([1., 2, 3, 4]), t=2) == .3
    assert covered(np.arange(4.), np.array([1., 2, 3, 4]), t=2) == .7

def test_no_expectation_knows_the_iteration_itself():
    x = np.zeros((20, 1, 3))
    x[12] = 1000.
    for what, F in expectations(x, task=10).items(): assert (F[12 - 5] == 0).all(), what
    assert expectations(x, task=10)['last five'][13 - 5:18 - 5].tolist() == [[[200.] * 3]] * 5
    assert expectations(x, task=10)['last one'][13 - 5].tolist() == [[1000.] * 3]
    assert (expectations(x, task=10)['five of the task'][:10 - 5] == 0).all() # never of another task

def test_seeds_that_a_file_has_are_not_run_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(load, 'record', lambda seed: asked.append(seed) or invented(seed))
    first, again = measure_load(tmp_path/'l.csv.gz', [3, 4]), measure_load(tmp_path/'l.csv.gz', [4, 5])
    assert asked == [3, 4, 5] and again.seed.unique().tolist() == [3, 4, 5] and len(again) == 3 * 12
    assert again.columns.equals(first.columns) and not again.isna().any(axis=None)
    assert pd.read_csv(tmp_path/'l.csv.gz').equals(again)
