import errno, os
from pathlib import Path
import pytest
from moe_merge_nb.safe.files import *


def test_a_file_is_replaced_as_a_whole_or_not_at_all():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'deep'/'a.json'
        write_json(path, [1])
        with pytest.raises(ZeroDivisionError):
            with replacing(path) as part: part.write_text('[2'); 1/0
        assert path.read_text() == '[\n 1\n]' and list(path.parent.iterdir()) == [path]


def test_what_comes_onto_the_disk_comes_in_this_order():
    import tempfile
    from unittest.mock import patch
    seen = []
    real = dict(fsync=os.fsync, replace=os.replace)
    def noted(name):
        def call(*args):
            seen.append(name)
            return real[name](*args)
        return call
    with tempfile.TemporaryDirectory() as d:
        with patch('os.fsync', noted('fsync')), patch('os.replace', noted('replace')): write_text(f'{d}/a', 'x')
    assert seen == ['fsync', 'replace', 'fsync']                                    # the bytes, the name, the directory


def test_a_full_disk_leaves_the_old_file_and_an_error_that_names_it():
    import tempfile
    from unittest.mock import patch
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    says = 'a.txt cannot be written .No space left on device.; what was there before is untouched'
    with tempfile.TemporaryDirectory() as d:
        write_text(f'{d}/a.txt', 'old')
        with patch('os.fsync', full), pytest.raises(OSError, match=says) as e: write_text(f'{d}/a.txt', 'new')
        assert e.value.errno == errno.ENOSPC
        assert Path(d, 'a.txt').read_text() == 'old' and os.listdir(d) == ['a.txt']


def test_parts_of_killed_writers_are_removed():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        a, b, c = (part_of(Path(d, name)).name for name in ('a.txt', 'a.txt', 'b.txt'))
        for name, days in ((a, 2), (b, 0), (c, 2), ('.mine.part', 2)):
            Path(d, name).mkdir()
            Path(d, name, '.tmpX').touch()
            then = Path(d, name).stat().st_mtime - 86_400 * days
            os.utime(Path(d, name), (then, then))
        write_text(f'{d}/a.txt', 'x')
        assert sorted(os.listdir(d)) == sorted([b, '.mine.part', 'a.txt'])
        sweep(Path(d), age=0)
        assert sorted(os.listdir(d)) == ['.mine.part', 'a.txt']


def test_a_directory_that_cannot_be_written_to_is_found_out():
    import tempfile
    from unittest.mock import patch
    def refused(*args, **kwargs): raise PermissionError(errno.EACCES, 'Permission denied')
    with tempfile.TemporaryDirectory() as d:
        check_writable(f'{d}/new')
        assert os.listdir(f'{d}/new') == []
        for made in ('pathlib.Path.mkdir', 'pathlib.Path.write_text'):
            says = f'{d} cannot be written to .Permission denied'
            with patch(made, refused), pytest.raises(PermissionError, match=says):
                check_writable(d)
        Path(d, 'file').touch()
        with pytest.raises(OSError, match='file cannot be written to .File exists'): check_writable(f'{d}/file')
