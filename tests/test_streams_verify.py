import json, os, tempfile
from pathlib import Path
from unittest.mock import patch
import pytest
from PIL import Image
import moe_merge_nb.streams.verify as module


def test_a_file_is_decoded_once_until_it_changes():
    true = module.open_image
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        cache, files = d/'cache'/'c.sqlite3', [str(d/f'{i}.png') for i in range(4)]
        for f in files[:3]: Image.new('RGB', (8, 8)).save(f)
        Path(files[3]).write_bytes(b'no image')
        def decoded():
            "The files that a verification opens, and what is wrong with each file"
            opened = []
            def counting(p):
                opened.append(Path(p).name)
                return true(p)
            with patch.object(module, 'open_image', counting): found = module.verify(files, cache)
            return sorted(opened), [reason for _, reason in found.values()]
        every = ['0.png', '1.png', '2.png', '3.png']
        first, reasons = decoded()
        assert first == every and reasons[:3] == [None]*3 and 'none of JPEG' in reasons[3]
        assert decoded() == (['3.png'], reasons)
        Image.new('RGB', (9, 8)).save(files[1])
        os.utime(files[2], ns=(1, 1))
        assert decoded() == (['1.png', '2.png', '3.png'], reasons)
        good = cache.read_bytes()
        for broken in (b'', b'{', bytes(5000), good[:-20], good[:3000], good.replace(b'Pillow', b'Pullow')):
            cache.write_bytes(broken)
            opened, found = decoded() # rows that are whole are still known
            assert '3.png' in opened and found == reasons, broken[:20]
        blocked = d/'file'
        blocked.write_text('') # no folder can be made there
        with pytest.warns(UserWarning, match='could not be kept'): found = module.verify(files, blocked/'c.sqlite3')
        assert [reason for _, reason in found.values()] == reasons


def test_an_interrupted_verification_goes_on_where_it_was():
    true = module.open_image
    with tempfile.TemporaryDirectory() as d:
        cache, files, opened = Path(d)/'c.sqlite3', [f'{d}/{i}.png' for i in range(4)], []
        for f in files: Image.new('RGB', (8, 8)).save(f)
        def interrupted(p):
            if p == files[2]: raise KeyboardInterrupt
            return true(p)
        def counting(p):
            opened.append(p)
            return true(p)
        with patch.object(module, 'open_image', interrupted), pytest.raises(KeyboardInterrupt):
            module.verify(files, cache)
        with patch.object(module, 'open_image', counting): module.verify(files, cache)
        assert sorted(opened) == files[2:]
