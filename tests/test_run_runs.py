import contextlib, io, pytest
from tempfile import TemporaryDirectory
from moe_merge_nb.run.runs import *
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result


def test_incomplete_runs_are_left_out_and_different_streams_refused():
    import contextlib, io
    with TemporaryDirectory() as d, contextlib.redirect_stderr(io.StringIO()) as err:
        r = example_result('moe')
        r.matrix = r.matrix[r.matrix.after != 'DTD']
        save_result(r, f'{d}/a/unfinished')
        with pytest.raises(ValueError, match='none of 1 run'): load_runs([d])
        save_result(example_result('moe'), f'{d}/a/finished')
        assert len(load_runs([d])) == 1
        assert err.getvalue().count('unfinished') == 2
        save_result(example_result('moe', n_tasks=3), f'{d}/b')
        message = r'1 run: example \(3 tasks, order 1\); 1 run: example \(4 tasks'
        with pytest.raises(ValueError, match=message): load_runs([d])
        with pytest.raises(FileNotFoundError, match='no config.json'): load_runs([f'{d}/c'])
