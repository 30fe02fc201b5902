import io, json, os, pickle, struct, tempfile, warnings, zlib
from pathlib import Path
import numpy as np, open_clip, pytest, torch
from PIL import Image
from moe_merge_nb.streams.images import few_shot, open_image, readable, saved_few_shot, train_transform
from moe_merge_nb.streams.images import test_transform as evaluation_transform

PNG = b'\x89PNG\r\n\x1a\n'
def chunk(tag, data):
    "One chunk of a PNG file"
    return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype='uint8'))
def saved(kind, im=NOISE):
    b = io.BytesIO()
    im.save(b, kind)
    return b.getvalue()
def ones(kind): return Image.fromarray(np.ones((4, 4), kind))
def huge(w, h): # a header is enough
    return PNG + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'')

def test_what_is_refused_is_named_with_the_reason():
    flipped = bytearray(saved('PNG'))
    flipped[60] ^= 255
    bad = {
        'empty.png': (b'', '0 bytes'),
        'text.jpg': (b'a shopping list', 'none of JPEG'),
        'drawing.eps': (saved('EPS'), 'none of JPEG'),
        'flipped.png': (bytes(flipped), '.'),
        'many.png': (huge(20_000, 20_000), 'more than 89,478,485 pixels'),
        'some.png': (huge(10_000, 9_000), '90,000,000 pixels, more than 89,478,485'),
        'line.png': (saved('PNG', Image.new('L', (1, 101))), '100 times'),
        'float.tif': (saved('TIFF', ones('float32')), '32-bit'),
        'int.tif': (saved('TIFF', ones('int32')), '32-bit')}
    for kind in readable():
        whole = saved(kind)
        bad |= {f'half.{kind}': (whole[:len(whole)//2], '.'), f'head.{kind}': (whole[:12], '.')}
    reasons = {name: reason for name, (_, reason) in bad.items()}
    reasons |= {'gone.png': 'No such file', 'link.png': 'No such file'}
    reasons |= {'dir.png': 'no regular file', 'pipe.png': 'no regular file'}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, (content, _) in bad.items(): (folder/name).write_bytes(content)
        (folder/'dir.png').mkdir()
        (folder/'link.png').symlink_to(folder/'gone.png')
        os.mkfifo(folder/'pipe.png')
        for name, reason in reasons.items():
            with pytest.raises(ValueError, match=reason) as e, warnings.catch_warnings():
                warnings.simplefilter('ignore') # Pillow's own about pixels
                open_image(folder/name)
            assert str(e.value).startswith(str(folder/name)) and '\n' not in str(e.value), e.value


def test_what_is_accepted_becomes_rgb_by_the_rule():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'image' # no extension: the content decides
        def through(im, kind='PNG', **options):
            im.save(path, kind, **options)
            out = open_image(path)
            assert out.mode == 'RGB' and type(out) is Image.Image
            return np.asarray(out)
        rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype='uint8'))
        for kind in ('PNG', 'BMP', 'TIFF', 'PPM'): assert np.array_equal(through(rgb, kind), rgb)
        assert np.array_equal(through(rgb, 'WEBP', lossless=True), rgb)
        assert through(rgb, 'JPEG').shape == through(rgb, 'GIF').shape == (5, 7, 3)
        grey, palette = rgb.convert('L'), rgb.quantize(4)
        assert np.array_equal(through(grey), np.asarray(grey)[..., None].repeat(3, -1))
        assert through(Image.fromarray(np.array([[False, True]])))[0, :, 0].tolist() == [0, 255]
        assert np.array_equal(through(palette), palette.convert('RGB'))
        inks = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 0]]], 'uint8') # paper, black, cyan
        seen = [[255]*3, [0]*3, [0, 255, 255]]
        cmyk = Image.fromarray(inks, 'CMYK')
        assert through(cmyk, 'TIFF').tolist() == [seen]
        large = through(cmyk.resize((48, 16), 0), 'JPEG')
        assert abs(large[8, [8, 24, 40]].astype(int) - seen).max() < 12
        assert through(Image.new('L', (100, 1))).shape == (1, 100, 3)


def test_sixteen_bits_keep_their_upper_eight():
    values, expected = np.array([[0, 255, 256, 32768, 65535]], 'uint16'), [[v]*3 for v in (0, 0, 1, 128, 255)]
    big_endian = values.astype('>u2')
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 5, 1, 16, 2, 0, 0, 0)) # RGB, 16 bits each
    pixels = chunk(b'IDAT', zlib.compress(b'\0' + big_endian[0].repeat(3).tobytes()))
    colour = PNG + header + pixels + chunk(b'IEND', b'')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'16.png'
        for kind in ('PNG', 'TIFF'):
            Image.fromarray(values).save(path, kind)
            assert np.asarray(open_image(path))[0].tolist() == expected, kind
        for content in (b'P5 5 1 65535\n' + big_endian.tobytes(), colour):
            path.write_bytes(content)
            assert np.asarray(open_image(path))[0].tolist() == expected


def test_transparent_is_composited_on_white():
    def array(values): return Image.fromarray(np.array(values, 'uint8'))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'image'
        def through(im, kind='PNG', **options):
            im.save(path, kind, **options)
            return np.asarray(open_image(path))[0].tolist()
        red = array([[[255, 0, 0, 255], [255, 0, 0, 128], [255, 0, 0, 0]]]) # opaque, half, not at all
        assert through(red) == [[255, 0, 0], [255, 127, 127], [255]*3]
        grey = Image.fromarray(np.array([[[9, 255], [9, 0]]], 'uint8'), 'LA')
        assert through(grey) == [[9]*3, [255]*3]
        p = Image.new('P', (2, 1))
        p.putpalette([10, 20, 30, 40, 50, 60])
        p.putpixel((1, 0), 1)
        for kind in ('PNG', 'GIF'): assert through(p, kind, transparency=1) == [[10, 20, 30], [255]*3]
        assert through(array([[7, 8]]), transparency=7) == [[255]*3, [8]*3] # a transparent grey
        two = array([[[1, 2, 3], [4, 5, 6]]])
        assert through(two, transparency=(1, 2, 3)) == [[255]*3, [4, 5, 6]] # a transparent colour


def test_the_first_frame_upright():
    blue, red = (Image.new('RGB', (4, 4), c) for c in ('blue', 'red'))
    arrow = Image.new('L', (32, 16))
    arrow.paste(255, (0, 0, 8, 8)) # white corner, upper left
    stored_as = { # how the camera turns what it stores
        1: None,
        2: 'FLIP_LEFT_RIGHT',
        3: 'ROTATE_180',
        4: 'FLIP_TOP_BOTTOM',
        5: 'TRANSPOSE',
        6: 'ROTATE_90',
        7: 'TRANSVERSE',
        8: 'ROTATE_270'}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'image'
        for kind in ('GIF', 'TIFF', 'WEBP', 'PNG'):
            options = dict(lossless=True) if kind == 'WEBP' else {}
            blue.save(path, kind, save_all=True, append_images=[red], **options)
            assert open_image(path).getpixel((1, 1)) == (0, 0, 255), kind
        for tag, turn in stored_as.items():
            stored = arrow.transpose(Image.Transpose[turn]) if turn else arrow
            exif = Image.Exif()
            exif[0x0112] = tag
            for kind in ('JPEG', 'TIFF', 'PNG', 'WEBP'):
                stored.convert('RGB').save(path, kind, exif=exif)
                seen = np.asarray(open_image(path))[..., 0].astype(int)
                assert seen.shape == (16, 32) and abs(seen - np.asarray(arrow)).mean() < 8, (kind, tag)
        arrow.save(path, 'JPEG', exif=b'Exif\0\0garbage that is no TIFF header')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert open_image(path).size == (32, 16) # damaged EXIF, good pixels


def test_both_transforms_equal_those_of_open_clip():
    def seeded(transform, im):
        torch.manual_seed(7)
        return transform(im)
    rng = np.random.default_rng(0)
    for w, h in ((61, 40), (40, 61), (32, 32), (500, 375), (20, 9)):
        im = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype='uint8'))
        for im in (im, im.convert('L'), im.quantize(16), im.convert('RGBA'), im.convert('CMYK')):
            for ours, train in ((evaluation_transform(32), False), (train_transform(32), True)):
                a, b = seeded(ours, im), seeded(open_clip.image_transform(32, is_train=train), im)
                assert a.shape == (3, 32, 32) and a.dtype == torch.float32 and torch.equal(a, b)


def test_evaluation_is_deterministic_training_is_not_and_never_flips():
    im = Image.fromarray((np.mgrid[:60, :60][1]*4).astype('uint8')) # brighter to the right
    test, train = evaluation_transform(32), train_transform(32)
    torch.manual_seed(0)
    assert torch.equal(test(im), test(im))
    assert not all(torch.equal(train(im), train(im)) for _ in range(20))
    for _ in range(50):
        x = train(im)
        assert x[:, :, 0].mean() < x[:, :, -1].mean()
    assert torch.equal(pickle.loads(pickle.dumps(test))(im), test(im)) # workers may be spawned
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f'size is {bad}'): evaluation_transform(bad)


def test_few_shots_are_seeded_nested_and_complete():
    labels = np.random.default_rng(1).integers(0, 5, 200)
    one, five = few_shot(labels, 1, 3), few_shot(labels, 5, 3)
    assert np.bincount(labels[five]).tolist() == [5]*5 and len(set(five)) == 25 and five == sorted(five)
    assert set(one) < set(five) and five == few_shot(torch.tensor(labels), 5, 3) != few_shot(labels, 5, 4)
    with pytest.raises(ValueError, match="shots is 2, but class 'owl' has 1"):
        few_shot([0, 0, 1], 2, classes=['cat', 'owl'])
    with pytest.raises(ValueError, match="class 'yak' has 0"): few_shot([0, 1], 1, classes=['cat', 'owl', 'yak'])
    with pytest.raises(ValueError, match='class 1 has 1'): few_shot([0, 0, 1], 2)
    with pytest.raises(ValueError, match='shots is 0'): few_shot([0], 0)


def test_one_list_for_every_stage_and_only_for_its_data():
    labels, names = np.arange(30) % 3, [f'{i}.png' for i in range(30)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'new'/'list.json'
        keep = saved_few_shot(path, labels, 4, 1, names=names)
        assert keep == few_shot(labels, 4, 1)
        assert [p.name for p in path.parent.iterdir()] == ['list.json'] # nothing half-written stays
        with pytest.raises(ValueError, match='29 names beside 30'): saved_few_shot(path, labels, 4, 1, names=names[:-1])
        content = json.loads(path.read_text())
        assert content['names'] == [names[i] for i in keep]
        another = next(i for i in range(30) if i not in keep and i % 3 == keep[0] % 3)
        other = [another, *keep[1:]]
        path.write_text(json.dumps(content | dict(positions=other))) # as if drawn by another library
        assert saved_few_shot(path, labels, 4, 1, names=names) == other # the file decides


def test_a_list_of_other_data_or_a_damaged_one_is_refused():
    labels, names = np.arange(30) % 3, [f'{i}.png' for i in range(30)]
    changes = [
        dict(shots=5),
        dict(seed=2),
        dict(labels=labels[::-1]),
        dict(names=names[::-1]),
        dict(labels=labels[:-1], names=names[:-1]),
        dict(names=None)]
    damage = [
        *('', '[1, 2', '{}', '[]', '[' * 10**5),
        *(f'{{"positions": {p}}}' for p in ('null', '["x"]', '[Infinity]', '[1.5]', '[0]'))]
    with tempfile.TemporaryDirectory() as folder:
        good = dict(path=Path(folder)/'list.json', labels=labels, shots=4, seed=1, names=names)
        keep, path = saved_few_shot(**good), good['path']
        content = json.loads(path.read_text())
        for change in changes:
            with pytest.raises(ValueError, match='list.json was made for other data'): saved_few_shot(**(good | change))
        for broken in damage:
            path.write_text(broken)
            with pytest.raises(ValueError, match='list.json.*delete it'): saved_few_shot(**good)
        for wrong in (keep[:-1], [*keep, keep[0]], [*keep[:-1], 99], [-1, *keep[1:]]):
            path.write_text(json.dumps(content | dict(positions=wrong)))
            with pytest.raises(ValueError, match='4 images per class'): saved_few_shot(**good)
