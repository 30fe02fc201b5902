"""`moe-merge-data shrink`: small images of the datasets, complete or not there, and never those of other settings."""
import hashlib
import subprocess
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from moe_merge_nb.streams import shrink as module
from moe_merge_nb.streams.datasets import find
from moe_merge_nb.streams.folder import folder
from moe_merge_nb.streams.miniature import miniature
from moe_merge_nb.streams.prepare import main
from moe_merge_nb.streams.shrink import capped, list_of, shrink, small

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return miniature(tmp_path_factory.mktemp('data'), per_class=5, classes=2)

def tree(root):
    "The content of every file."
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob('*')) if p.is_file()}


def test_the_command_writes_a_folder_stream_with_names_and_prompts(data, tmp_path, capsys):
    to = tmp_path/'small'
    assert main(['shrink', str(data), str(to), '--tasks', 'MNIST,SUN397,DTD', '--no-check', '--per-class', '3/2']) == 0
    stream = folder(to, size=32)
    assert stream.names == ['DTD', 'MNIST', 'SUN397']
    assert [(len(t.train), len(t.test)) for t in stream] == [(6, 4), (6, 4), (6, 4)]
    assert stream[1].classes == ('0', '9') and stream[1].templates == ('a photo of the number: "{}".',)
    assert stream[2].classes == ('abbey', 'youth hostel')
    assert {Image.open(p).size for t in stream for p in t.train.paths} == {(32, 32)}
    assert sorted(p.name for p in (to/'DTD/train/banded').iterdir()) == ['0000.jpg', '0001.jpg', '0002.jpg']
    sums = (to/'SHA256SUMS').read_bytes()
    assert f'SHA-256 of {to}/SHA256SUMS: {hashlib.sha256(sums).hexdigest()}\n' in capsys.readouterr().out
    assert subprocess.run(['sha256sum', '--quiet', '-c', 'SHA256SUMS'], cwd=to).returncode == 0


def test_images_are_the_middle_squares_of_the_originals(data, tmp_path):
    shrink(data, tmp_path, ('DTD',), check=False)
    f = find('DTD', data, check=False)
    first = f.test.dataset[f.test.indices[0]][0]
    with Image.open(tmp_path/'DTD/test/banded/0000.jpg') as im: have = np.asarray(im).astype(int)
    assert np.abs(have - np.asarray(small(first)).astype(int)).mean() < 4
    assert small(Image.linear_gradient('L').resize((90, 30)), 30).size == (30, 30)
    flat = Image.new('RGB', (90, 30), 'red')
    flat.paste((0, 0, 255), (30, 0, 60, 30))
    assert np.asarray(small(flat, 30))[:, 5:25].reshape(-1, 3).tolist() == 600*[[0, 0, 255]]


def test_the_same_settings_write_the_same_bytes_and_seeds_choose(data, tmp_path):
    made = {}
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        made[name] = shrink(data, tmp_path/name, ('Food',), most=(2, 2), seed=seed, check=False), tree(tmp_path/name)
    assert made['a'] == made['b'] and made['a'][0] != made['c'][0]
    assert capped([0, 0, 0, 1, 1, 1], None) == [0, 1, 2, 3, 4, 5]
    assert {len(capped([0]*9 + [1]*3, 4, s)) for s in range(5)} == {7}
    assert len({tuple(capped([0]*9, 4, s)) for s in range(5)}) > 1


def test_a_second_call_goes_on_and_other_settings_are_refused(data, tmp_path, capsys):
    digest = shrink(data, tmp_path, ('DTD',), check=False)
    before = (tmp_path/'DTD/train/banded/0000.jpg').stat().st_mtime_ns
    assert shrink(data, tmp_path, ('DTD',), check=False) == digest
    assert 'DTD: is there, left as it is' in capsys.readouterr().out
    both = shrink(data, tmp_path, ('DTD', 'Food'), check=False)
    assert both != digest and (tmp_path/'DTD/train/banded/0000.jpg').stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="DTD is there and was made with .*'size': 32.*, not with .*'size': 16"):
        shrink(data, tmp_path, ('DTD',), size=16, check=False)
    (tmp_path/'MNIST').mkdir()
    with pytest.raises(ValueError, match='MNIST is there and was not made by this command'):
        shrink(data, tmp_path, ('Food', 'MNIST'), check=False)


def test_what_is_not_finished_is_not_there(data, tmp_path, monkeypatch):
    real, seen = module.small, []
    def dies(image, size):
        seen.append(image)
        if len(seen) == 5: raise KeyboardInterrupt
        return real(image, size)
    monkeypatch.setattr(module, 'small', dies)
    with pytest.raises(KeyboardInterrupt): shrink(data, tmp_path, ('DTD',), check=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, 'small', real)
    shrink(data, tmp_path, ('DTD',), check=False)
    assert len(list(tmp_path.rglob('*.jpg'))) == 20


def test_the_list_changes_with_every_file(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'a/x.jpg').write_bytes(b'1')
    (tmp_path/'SHA256SUMS').write_text('old')
    assert list_of(tmp_path) == hashlib.sha256(b'1').hexdigest() + '  a/x.jpg\n'
    (tmp_path/'a/x.jpg').write_bytes(b'2')
    assert list_of(tmp_path).startswith(hashlib.sha256(b'2').hexdigest())
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='holds no files'): list_of(tmp_path/'empty')


@pytest.mark.parametrize('more, said', [
    (('--tasks', 'DTD,Cars'), 'no dataset is called Cars; choose among Aircraft'),
    (('--per-class', '3/0'), "--per-class is '3/0': give two whole numbers from 1"),
    (('--per-class', 'a'), "--per-class is 'a': give two"),
    (('--size', '0'), 'size is 0: choose 1 to 4096'),
])
def test_bad_input_is_one_line_and_writes_nothing(data, tmp_path, capsys, more, said):
    assert main(['shrink', str(data), str(tmp_path/'x'), '--no-check', *more]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1 and not (tmp_path/'x').exists()


def test_datasets_that_are_not_there_are_named_in_one_line(tmp_path, capsys):
    assert main(['shrink', str(tmp_path/'none'), str(tmp_path/'x'), '--tasks', 'DTD,Food']) == 1
    err = capsys.readouterr().err
    assert '2 of 2 datasets' in err and '(DTD, Food): DTD: missing: dtd/dtd/images' in err and '--tasks' in err
    assert err.count('\n') == 1 and not (tmp_path/'x').exists()
