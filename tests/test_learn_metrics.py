import numpy as np, pytest
from moe_merge_nb.learn.metrics import mtil_metrics


def test_incomplete_matrices_are_refused():
    with pytest.raises(ValueError, match=r'\(2, 3\)'): mtil_metrics(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r'\(0, 0\)'): mtil_metrics(np.zeros((0, 0)))
    with pytest.raises(ValueError, match=r'A\[1, 0\] is nan'): mtil_metrics([[1, 2], [np.nan, 3]])
