"""No picture takes more memory than is stated, and photographs as phones save them are read."""
import os
import resource
import struct
import sys
import zlib
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VisionDataset
from moe_merge_nb.streams import images
from moe_merge_nb.streams.datasets import Photos
from moe_merge_nb.streams.images import MAX_PIXELS, open_image, readable

SIDE = 5000 # pixels

def chunk(tag, data):
    return struct.pack('>I', len(data)) + tag + data + struct.pack('>I', zlib.crc32(tag + data))

def palette_png(path, side):
    "A picture of one transparent colour, whose rows are written without ever holding it."
    pack, rows = zlib.compressobj(9), []
    for _ in range(side): rows.append(pack.compress(b'\0' * (side + 1)))
    data = b''.join([*rows, pack.flush()])
    head = struct.pack('>IIBBBBB', side, side, 8, 3, 0, 0, 0)
    parts = [(b'IHDR', head), (b'PLTE', b'\xff\0\0' * 2), (b'tRNS', b'\x80'), (b'IDAT', data), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*p) for p in parts))

def within(more, f):
    "Does `f` return true in a process that may take so many bytes `more` than this one?"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1] == 0
    pages = int(open('/proc/self/statm').read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
    try: os._exit(0 if f() else 1)
    except BaseException: os._exit(2)

def test_a_picture_takes_less_than_ten_bytes_a_pixel_to_decode(tmp_path):
    path = tmp_path/'white.png'
    palette_png(path, SIDE)
    assert path.stat().st_size < 100_000 and SIDE**2 < MAX_PIXELS
    def decoded():
        im = open_image(path)
        return im.size == (SIDE, SIDE) and im.getpixel((SIDE - 1, SIDE - 1)) == (255, 127, 127)
    assert within(10 * SIDE**2, decoded)

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16'])
def test_bands_change_no_pixel(tmp_path, monkeypatch, mode):
    rng = np.random.default_rng(0)
    im = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype='uint8'), 'RGBA')
    if mode == 'I;16': im = Image.fromarray(rng.integers(0, 65536, (37, 23), dtype='uint16'))
    elif mode == 'P': im = im.convert('RGB').quantize(16)
    else: im = im.convert(mode)
    path = tmp_path/('a.tif' if mode == 'CMYK' else 'a.png')
    im.save(path, **(dict(transparency=3) if mode == 'P' else {}))
    whole = open_image(path)
    monkeypatch.setattr(images, 'BAND', 50)
    assert np.array_equal(whole, open_image(path)) and len(np.unique(whole)) > 1

def large_jpeg(path, width, height, **how): Image.new('L', (width, height), 90).save(path, **how)

@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_large_photograph_is_decoded_at_half_its_size(tmp_path):
    large_jpeg(tmp_path/'a.jpg', 12_000, 9_000)
    im = open_image(tmp_path/'a.jpg')
    assert im.size == (6_000, 4_500) and im.getpixel((5_999, 4_499)) == (90, 90, 90)
    header = bytearray((tmp_path/'a.jpg').read_bytes())
    header[header.index(b'\xff\xc0') + 1] = 0xc2                               # as if it were progressive
    (tmp_path/'b.jpg').write_bytes(header)
    with pytest.raises(ValueError, match='b.jpg: it has 12000 x 9000 = 108,000,000 pixels'):
        open_image(tmp_path/'b.jpg')

def test_a_picture_of_the_benchmark_that_is_too_large_is_named():
    class Bomb(VisionDataset):
        _image_files = ['food/bomb.jpg']
        def __init__(self): pass
        def __getitem__(self, i): raise Image.DecompressionBombError('200000000 pixels')
    with pytest.raises(ValueError, match='food/bomb.jpg of Bomb cannot be read: 200000000 pixels'):
        Photos(Bomb(), [0], None)[0]

@pytest.mark.skipif('AVIF' not in readable(), reason='this Pillow cannot read AVIF')
def test_avif_is_read(tmp_path):
    Image.new('RGB', (40, 30), (200, 60, 60)).save(tmp_path/'a.avif', quality=90)
    r, g, b = open_image(tmp_path/'a.avif').getpixel((20, 15))
    assert abs(r - 200) < 6 and abs(g - 60) < 6 and abs(b - 60) < 6

@pytest.fixture
def plugin(tmp_path, monkeypatch):
    "A package called pillow_heif, which reads a format of its own."
    (tmp_path/'pillow_heif.py').write_text("""
from PIL import Image, ImageFile
class Heif(ImageFile.ImageFile):
    format = 'HEIF'
    def _open(self):
        self._size, self._mode = (3, 2), 'L'
        self.tile = [ImageFile._Tile('raw', (0, 0, 3, 2), 12, ('L', 0, 1))]
def register_heif_opener(): Image.register_open('HEIF', Heif, lambda head: head[4:12] == b'ftypheic')
""")
    monkeypatch.syspath_prepend(tmp_path)
    readable.cache_clear()
    yield
    Image.OPEN.pop('HEIF', None)
    Image.ID.remove('HEIF')
    sys.modules.pop('pillow_heif', None)
    readable.cache_clear()

HEIC = b'\0\0\0\x18ftypheic' + bytes([10, 20, 30, 40, 50, 60])

def test_heic_is_read_where_the_plugin_is_installed(tmp_path, plugin):
    (tmp_path/'a.heic').write_bytes(HEIC)
    assert np.asarray(open_image(tmp_path/'a.heic'))[:, :, 0].tolist() == [[10, 20, 30], [40, 50, 60]]

@pytest.mark.skipif('HEIF' in readable(), reason='the plugin is installed')
def test_and_where_it_is_not_its_name_is_said(tmp_path):
    (tmp_path/'a.HEIC').write_bytes(HEIC)
    with pytest.raises(ValueError, match='a.HEIC: it is none of JPEG.*pillow-heif may read it'):
        open_image(tmp_path/'a.HEIC')
