"""A second pico from folders of photographs: pictures, views, words, and a pretraining that goes on after a kill."""
import importlib.util
import json
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from moe_merge_nb.clip import pretrain as stages
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.clip.photographs import PhotoViews, classes_in, photographs, spelling, vary
from moe_merge_nb.clip.start import Muon

TOOLS = Path(__file__).parents[1]/'tools'

def tool(name):
    "The module of that file."
    spec = importlib.util.spec_from_file_location(name, TOOLS/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def squares(root, colours, n=4):
    "Coloured images, by SOURCE/CLASS."
    rng = np.random.default_rng(0)
    for place, colour in colours.items():
        (root/place).mkdir(parents=True)
        for i in range(n):
            im = Image.fromarray(rng.integers(0, 255, (40, 48, 3), 'uint8'))
            im.paste(colour, (10, 6, 38, 34))
            im.save(root/place/f'{i}.jpg')
    return root

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    colours = {'a/red_thing': 'red', 'a/blue': 'blue', 'b/red thing': 'red', 'b/lime': 'lime'}
    return squares(tmp_path_factory.mktemp('photos'), colours)


def test_folders_of_one_name_are_one_class(root):
    p = photographs(root)
    assert p.names == (('blue',), ('lime',), ('red thing',)) and p.kinds == ('thing',)*3
    assert tuple(p.images.shape) == (16, 3, 32, 32) and p.rows.shape == (3, 8)
    assert [sorted(set(r.tolist())) for r in p.rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [*range(8, 16)]]
    assert p.weights.tolist() == pytest.approx([2, 2, 8**.5])
    g = torch.Generator().manual_seed(0)
    middle = p.draw(torch.tensor([0, 1, 2]), g)[:, :, 12:20, 12:20].mean((2, 3))
    assert middle.argmax(1).tolist() == [2, 1, 0]


@pytest.mark.parametrize('places, said', [
    ((), 'is no folder'),
    (('a/one',), 'has 1 classes in sub-folders'),
    (('a/one', 'a/two'), 'a/two holds no images'),
])
def test_folders_that_cannot_be_learned_are_named(tmp_path, places, said):
    top = tmp_path/'x'
    for place in places: (top/place).mkdir(parents=True)
    if places: Image.new('RGB', (9, 9)).save(top/'a/one/0.jpg')
    with pytest.raises(ValueError, match=said): classes_in(top)


def test_views_vary_with_the_strength_and_repeat_with_the_seed(root):
    views = PhotoViews(photographs(root))
    (a, i, _), (b, j, _), (c, _, _) = views(1, 5, 8, .8), views(1, 5, 8, .8), views(1, 6, 8, .8)
    assert torch.equal(a, b) and torch.equal(i, j) and not torch.equal(a, c) and a.shape == (8, 3, 32, 32)
    x, g = torch.rand(64, 3, 32, 32), torch.Generator().manual_seed(1)
    still, strong = vary(x, 0., g), vary(x, .8, g)
    either = torch.stack([(still - x).abs().amax((1, 2, 3)), (still - x.flip(3)).abs().amax((1, 2, 3))]).min(0).values
    assert either.max() < 1e-5 and 10 < (still == x).flatten(1).all(1).sum() + 32 < 96 # mirrored or as it was
    assert (strong - x).abs().mean() > .1 and 0 <= strong.min() and strong.max() <= 1


def test_words_are_spelled_in_pieces_and_long_names_cut():
    pieces, cut = spelling(['cat', 'trilobite', 'one two three four five six seven eight nine ten eleven twelve'], 3)
    assert ''.join(pieces['trilobite']) == 'trilobite' and 'cat' not in pieces
    assert [c[:7] for c in cut] == ['one two']


def test_muon_steps_as_pytorchs_up_to_its_rounding():
    g = torch.Generator().manual_seed(0)
    for shape in ((48, 16), (16, 48)):
        start = torch.randn(shape, generator=g)
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        both = [kind([p], lr=.1, weight_decay=.05) for kind, p in ((Muon, ours), (torch.optim.Muon, theirs))]
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=g)
            theirs.grad = ours.grad.clone()
            for o in both: o.step()
        moved = (theirs - start).abs().mean()
        assert (ours - theirs).abs().mean() < .03*moved


def test_a_killed_pretraining_goes_on_and_ends_with_the_same_weights(root, tmp_path, monkeypatch, capsys):
    t = tool('pretrain_photo')
    monkeypatch.setattr(t, 'STEPS', (6, 2, 2))
    whole, killed = tmp_path/'whole.safetensors', tmp_path/'killed.safetensors'
    assert t.main([str(root), str(whole)]) == 0
    with monkeypatch.context() as m:
        def dies(*args, **kwargs): raise KeyboardInterrupt
        m.setattr(stages, 'stage_words', dies)
        with pytest.raises(KeyboardInterrupt): t.main([str(root), str(killed)])
    assert not killed.exists() and len(list(tmp_path.glob('killed-*.pt'))) == 1
    with pytest.raises(SystemExit, match='--resume goes on with it'): t.main([str(root), str(killed)])
    assert t.main([str(root), str(killed), '--resume']) == 0
    assert 'going on with' in capsys.readouterr().out
    assert killed.read_bytes() == whole.read_bytes() and list(tmp_path.glob('*.pt')) == []
    about = json.loads(whole.with_suffix('.json').read_text())
    assert about['classes'] == ['blue', 'lime', 'red thing'] and about['images'] == 16 and about['steps'] == [6, 2, 2]
    model, _ = load_clip('pico', str(whole))
    shipped, _ = load_clip('pico')
    assert not torch.equal(model.visual.conv1.weight, shipped.visual.conv1.weight)


@pytest.mark.parametrize('more, said', [
    (('x.pt',), 'give a name that ends with .safetensors'),
    (('x.safetensors', '--steps-factor', '0'), '--steps-factor is 0.0'),
    (('there.safetensors',), 'is there already'),
])
def test_bad_input_is_one_line(root, tmp_path, monkeypatch, more, said):
    (tmp_path/'there.safetensors').write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said) as e: tool('pretrain_photo').main([str(root), *more])
    assert '\n' not in str(e.value)
