import pandas as pd, pytest, tempfile
from pathlib import Path
from moe_merge_nb.learn.pack import load_results, pack, unpack
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result


def test_packing_keeps_what_it_says():
    results = [example_result(method, seed) for method in ('moe', 'moe_merge') for seed in range(2)]
    for r in results: r.config['merge'] = {'every': 25, 'on': True}
    with tempfile.TemporaryDirectory() as tmp:
        again = unpack(pack(results, f'{tmp}/x.csv.gz', fields=['merge.every', 'merge.on']))
        first = Path(tmp, 'x.csv.gz').read_bytes()
        assert pack(again, f'{tmp}/x.csv.gz', fields=['merge.every', 'merge.on']).read_bytes() == first
    for r, back in zip(results, again, strict=True):
        for name in ('matrix', 'selection', 'fixed'):
            pd.testing.assert_frame_equal(getattr(back, name), getattr(r, name))
        for k in ('method', 'stream', 'order', 'seed', 'data_seed', 'version', 'tasks', 'merge'):
            assert back.config[k] == r.config[k]
        assert sum(e['count'] for e in back.events) == sum(e['kind'] == 'merge' for e in r.events)


def test_paths_of_all_kinds_are_read():
    with tempfile.TemporaryDirectory() as tmp:
        for seed in range(2): save_result(example_result('moe', seed), f'{tmp}/sweep/{seed}')
        pack([example_result('moe_merge', seed) for seed in range(2)], f'{tmp}/packed.csv')
        assert len(load_results(f'{tmp}/sweep/0')) == 1 and len(load_results(f'{tmp}/sweep')) == 2
        both = load_results([f'{tmp}/sweep', f'{tmp}/packed.csv', example_result()])
        assert [r.config['method'] for r in both] == 2*['moe'] + 3*['moe_merge']
        assert [r.config['seed'] for r in both] == [0, 1, 0, 1, 0]
        with pytest.raises(FileNotFoundError, match='no finished run'): load_results(f'{tmp}/nothing')
        Path(tmp, 'other.csv').write_text('a,b\n1,2\n')
        with pytest.raises(ValueError, match='other.csv lacks the columns'): load_results(f'{tmp}/other.csv')

def test_runs_that_saw_other_images_under_one_data_seed_are_not_packed_together(tmp_path):
    runs = [example_result('moe'), example_result('moe_merge')]
    for r, digest in zip(runs, 'ab'): r.config['data_sha256'] = dict(Aircraft=digest * 64)
    with pytest.raises(ValueError, match='different images under the same data seed'): pack(runs, tmp_path/'r.csv')
    assert not list(tmp_path.iterdir())
    runs[1].config['data_sha256'] = runs[0].config['data_sha256']
    assert len(unpack(pack(runs, tmp_path/'r.csv'))) == 2
