"""What a run keeps is enough to make its stream again: size, root, names and tasks. So folders and MTIL at any size can
be rewritten and reproduced, and where the images have moved, `root` is given anew."""
import shutil
import sys
import numpy as np
import pytest
from PIL import Image
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run import cli
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import again, stream_of
from moe_merge_nb.run.rewrite import rewrite_run
from moe_merge_nb.streams.miniature import miniature

SMALL = (
    'model=toy', 'image_size=32', 'method=moe', 'train.iterations=3', 'train.batch=4', 'train.workers=0',
    'experts.n_experts=4', 'experts.rank=2', 'selectors=[oracle]')
ODD = 'my images [1], a=b'

def images(root):
    "Two tasks of two classes, red and green."
    for task in ('one', '2020'):
        for split, c in [(s, c) for s in ('train', 'test') for c in ('red', 'green')]:
            d = root/task/split/c
            d.mkdir(parents=True)
            for i in range(4):
                pixels = np.full((40, 40, 3), 30 * i, 'uint8')
                pixels[..., ('red', 'green').index(c)] = 250
                Image.fromarray(pixels).save(d/f'{i}.png')

@pytest.fixture(scope='module')
def folder_run(tmp_path_factory):
    "A run on a folder whose name Hydra could not read, in the order of names that look like numbers."
    d = tmp_path_factory.mktemp('here')
    images(d/ODD)
    line = ('stream=folder', f'root={d/ODD}', f'stream.cache={d/"cache"}', 'order=[one,2020]', *SMALL)
    job(composed(*line), str(d/'run'), False)
    return d

@pytest.fixture(scope='module')
def mtil_run(tmp_path_factory):
    "A run on two datasets of a small copy of MTIL."
    d = tmp_path_factory.mktemp('mtil')
    miniature(d/'data', classes=2, per_class=4)
    line = ('stream=mtil', f'root={d/"data"}', 'stream.check=false', 'order=[EuroSAT,DTD]', 'names=clip', *SMALL)
    job(composed(*line), str(d/'run'), False)
    return d

def same(a, b):
    "The same tasks of the same pictures."
    assert a.names == b.names and [t.classes for t in a] == [t.classes for t in b]
    assert [t.test[0][0].shape for t in a] == [(3, 32, 32)] * 2
    assert all((x.test[0][0] == y.test[0][0]).all() for x, y in zip(a, b))

def test_a_folder_run_is_made_again_from_what_it_keeps(folder_run):
    stored = load_result(folder_run/'run')
    stream = stream_of(stored.config)
    assert stream.names == ['one', '2020'] and stream[0].test[0][0].shape == (3, 32, 32)
    result = again(stored.config)
    assert result.matrix.equals(stored.matrix) and result.config['config_hash'] == stored.config['config_hash']
    assert result.config['words'] == stored.config['words']

def test_a_folder_run_is_rewritten_with_its_own_root_and_with_another(folder_run, monkeypatch, capsys):
    rows, _ = rewrite_run(folder_run/'run', 'drop_random', 2)
    assert list(rows.index) == ['one', '2020', 'mean']
    monkeypatch.chdir(folder_run)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    shutil.copytree(ODD, 'moved =[2]')
    line = ['moe-merge', 'rewrite=drop_random', 'budget=3', 'from=run', 'root=moved =[2]']
    monkeypatch.setattr(sys, 'argv', line)
    cli.main()
    assert 'run/rewrites/drop_random-3' in capsys.readouterr().out
    with pytest.raises(ValueError, match='nowhere'): rewrite_run('run', 'drop_random', 2, root='nowhere')

def test_an_mtil_run_is_made_again_and_rewritten(mtil_run):
    stored = load_result(mtil_run/'run')
    assert stored.config['tasks'] == ['EuroSAT', 'DTD']
    same(stream_of(stored.config), stream_of(stored.config, root=mtil_run/'data'))
    result = again(stored.config)
    assert result.matrix.equals(stored.matrix)
    rows, _ = rewrite_run(mtil_run/'run', 'drop_random', 2)
    assert list(rows.index) == ['EuroSAT', 'DTD', 'mean']

def test_a_run_of_before_is_made_again_if_its_root_is_given(folder_run, mtil_run):
    for where, root in ((folder_run, folder_run/ODD), (mtil_run, mtil_run/'data')):
        config = load_result(where/'run').config
        before = {k: v for k, v in config.items() if k not in ('stream_made', 'words')}
        same(stream_of(before, root=root), stream_of(config))
    config = load_result(folder_run/'run').config
    with pytest.raises(ValueError, match='root of the stream is not written down .*say root='):
        stream_of({k: v for k, v in config.items() if k != 'stream_made'})

def test_a_run_directory_of_before_is_found_by_its_old_name(folder_run, monkeypatch, capsys):
    monkeypatch.chdir(folder_run)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    shutil.copytree('run', 'runs/moe_merge/seed=0,selectors=[oracle]')
    monkeypatch.setattr(sys, 'argv', [
        'moe-merge', 'rewrite=drop_random', 'budget=2', 'from=runs/moe_merge/seed=0,selectors=[oracle]'])
    cli.main()
    assert 'rewrites/drop_random-2' in capsys.readouterr().out
