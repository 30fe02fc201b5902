import pandas as pd, pytest
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.learn.results import accuracy_matrix, example_result, summary


def test_accuracy_matrix_follows_the_order_of_the_config():
    r = example_result()
    A = accuracy_matrix(r, 'oracle')
    r.matrix = r.matrix.sample(frac=1, random_state=0)
    assert (accuracy_matrix(r, 'oracle') == A).all()
    order = [2, 0, 3, 1]
    r.config['tasks'] = [r.config['tasks'][t] for t in order]
    assert (accuracy_matrix(r, 'oracle') == A[order][:, order]).all()


def test_holes_and_doubles_are_refused():
    r = example_result()
    with pytest.raises(ValueError, match='gaussian'): accuracy_matrix(r, 'gausian')
    with pytest.raises(ValueError, match='oracle'): accuracy_matrix(r)
    whole, r.matrix = r.matrix, r.matrix.iloc[1:]
    with pytest.raises(ValueError, match='15 of 16'): accuracy_matrix(r, 'oracle')
    r.matrix = pd.concat([whole, whole])
    with pytest.raises(ValueError, match='twice'): accuracy_matrix(r, 'oracle')
