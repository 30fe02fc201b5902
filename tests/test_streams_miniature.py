import os, tempfile, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from moe_merge_nb.streams.miniature import chosen, draw, miniature


def test_miniatures_are_seeded_and_small():
    def read(d):
        "Every file but MATLAB's, which hold the date"
        files = (p for p in Path(d).rglob('*') if p.is_file() and p.suffix != '.mat')
        return {p.relative_to(d).as_posix(): p.read_bytes() for p in files}
    with tempfile.TemporaryDirectory() as d:
        roots = [miniature(Path(d)/str(i), classes=2, per_class=2, seed=seed) for i, seed in enumerate((0, 0, 1))]
        a, b, c = map(read, roots)
        assert a == b != c and a.keys() == c.keys()
        assert sum(map(len, a.values())) < 2e6
        grey = roots[0]/'caltech101/101_ObjectCategories/Faces/image_0003.jpg'
        assert Image.open(grey).mode == 'L' # a grey photograph


def test_nothing_real_is_overwritten():
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/'food-101').mkdir()
        with pytest.raises(ValueError, match='food-101 already'): miniature(d)
        assert os.listdir(d) == ['food-101']
    for bad in (dict(classes=1), dict(classes=11), dict(per_class=0)):
        with pytest.raises(ValueError, match='choose'): miniature('never', **bad)
    assert not os.path.exists('never')
