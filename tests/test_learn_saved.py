import json, pandas as pd, pytest, tempfile, torch
from pathlib import Path
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import load_result, save_result


def test_a_saved_run_comes_back_the_same():
    r = example_result()
    r.adapters = {'up.weight': torch.arange(6.).view(2, 3).t()}
    with tempfile.TemporaryDirectory() as tmp:
        for _ in range(2): back = load_result(save_result(r, f'{tmp}/run'), adapters=True) # again: replaced
        assert not [p for p in Path(tmp, 'run').iterdir() if p.name.startswith('.')]
    for name in ('matrix', 'selection', 'usage', 'fixed'):
        pd.testing.assert_frame_equal(getattr(back, name), getattr(r, name))
    assert (back.config, back.events, back.timings) == (r.config, r.events, r.timings)
    torch.testing.assert_close(back.adapters['up.weight'], r.adapters['up.weight'])


def test_a_bad_file_is_named():
    with tempfile.TemporaryDirectory() as tmp:
        d = save_result(example_result(), f'{tmp}/run')
        (d/'sha256.json').unlink() # otherwise they would find all of it
        (d/'events.jsonl').write_text('{"kind": "merge", ')
        with pytest.raises(ValueError, match='events.jsonl cannot be read'): load_result(d)
        (d/'events.jsonl').write_text('')
        (d/'matrix.csv').write_text('selector,after,accuracy\noracle,a,1\n')
        with pytest.raises(ValueError, match=r"matrix.csv lacks the columns \['task'\]"): load_result(d)
        (d/'matrix.csv').unlink()
        with pytest.raises(FileNotFoundError, match='matrix.csv is missing'): load_result(d)
        with pytest.raises(FileNotFoundError, match='nowhere/config.json is missing'): load_result(f'{tmp}/nowhere')


def test_a_changed_file_is_noticed_and_named():
    r = example_result()
    r.adapters = {'up.weight': torch.ones(3)}
    with tempfile.TemporaryDirectory() as tmp:
        d = save_result(r, f'{tmp}/run')
        names = [p.name for p in d.iterdir() if p.name != 'sha256.json']
        assert sorted(json.loads((d/'sha256.json').read_text())) == sorted(names) and len(names) == 8
        for name in names:
            good = (d/name).read_bytes()
            (d/name).write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
            with pytest.raises(ValueError, match=f'{name} cannot be read .*not those that sha256.json names'):
                load_result(d, adapters=True)
            (d/name).write_bytes(good)
        whole = load_result(d, adapters=True)
        (d/'sha256.json').write_text('[]')
        with pytest.raises(ValueError, match='sha256.json cannot be read'): load_result(d)
        (d/'sha256.json').unlink()
        with pytest.raises(ValueError, match='sha256.json is missing'): load_result(d, checked=True)
        with pytest.warns(UserWarning, match='sha256.json is missing'): unchecked = load_result(d)
        pd.testing.assert_frame_equal(unchecked.matrix, whole.matrix)
        r.adapters = None
        assert load_result(save_result(r, d), adapters=True).adapters is None # another result's do not stay


def test_a_result_that_was_not_written_to_its_end_is_none():
    from unittest.mock import patch
    import os
    r, replace = example_result(), os.replace
    with tempfile.TemporaryDirectory() as tmp:
        for last in range(8):
            save_result(r, f'{tmp}/run')
            left = [last]
            def some(a, b):
                if not left[0]: raise OSError(5, 'gone')
                left[0] -= 1
                replace(a, b)
            with patch('moe_merge_nb.safe.files.os.replace', some), pytest.raises(OSError, match='gone'):
                save_result(example_result(seed=1), f'{tmp}/run')
            with pytest.raises(FileNotFoundError, match='config.json is missing'): load_result(f'{tmp}/run')
            if last: # a power failure that brings the old config.json back, beside new tables
                config = json.dumps(r.config, indent=1)
                Path(tmp, 'run', 'config.json').write_text(config)
                with pytest.raises(ValueError, match='not those that sha256.json names'):
                    load_result(f'{tmp}/run')
