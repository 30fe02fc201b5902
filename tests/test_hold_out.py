"""Settings are chosen on held out training images, never on test images."""
import hashlib
import importlib.util
from pathlib import Path
import pytest
from PIL import Image
from moe_merge_nb.streams.folder import folder

spec = importlib.util.spec_from_file_location('hold_out', Path(__file__).parents[1]/'tools/hold_out.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

@pytest.fixture
def source(tmp_path):
    for i in range(48):
        split, c = ('train', 'ab'[i % 2]) if i < 24 else ('test', 'ab'[i % 2])
        f = tmp_path/f'src/task/{split}/{c}/{i:02d}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (9, 9), (i, i, i)).save(f)
    (tmp_path/'src/task/classes.txt').write_text('a: apple\n')
    (tmp_path/'src/templates.txt').write_text('my {}.\n')
    return tmp_path/'src'


def test_every_fifth_training_image_is_held_out_and_no_test_image_is_used(source, tmp_path):
    digest = tool.hold_out(source, tmp_path/'dst')
    t, = folder(tmp_path/'dst', size=9)
    assert [Path(p).name for p in t.test.paths] == ['08.png', '18.png', '09.png', '19.png']
    assert len(t.train) == 20 and t.classes == ('apple', 'b') and t.templates == ('my {}.',)
    originals = {p.read_bytes() for p in source.glob('task/test/*/*')}
    both = [Path(p).read_bytes() for p in (*t.train.paths, *t.test.paths)]
    assert len(set(both)) == 24 and not set(both) & originals
    assert not any(p.is_symlink() for p in (tmp_path/'dst').rglob('*'))
    assert hashlib.sha256((tmp_path/'dst/SHA256SUMS').read_bytes()).hexdigest() == digest
    assert tool.hold_out(source, tmp_path/'again') == digest


def test_what_cannot_be_divided_is_refused_and_nothing_written(source, tmp_path):
    to = tmp_path/'dst'
    with pytest.raises(ValueError, match='/a holds 12 images: of fewer than 13'): tool.hold_out(source, to, 13)
    with pytest.raises(ValueError, match='--every is 1'): tool.hold_out(source, to, 1)
    with pytest.raises(ValueError, match='no folder'): tool.hold_out(source/'none', to)
    with pytest.raises(ValueError, match='is there already'): tool.hold_out(source, source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['src']
