import contextlib, io, os, shutil, tempfile
from pathlib import Path
from unittest.mock import patch
from urllib.error import URLError
import pytest
from moe_merge_nb.streams.datasets import find
from moe_merge_nb.streams.miniature import miniature
from moe_merge_nb.streams.prepare import check_names, damaged, download, main, status
from moe_merge_nb.streams.sources import MTIL

def run(*args):
    "Exit code, what was written to the screen, and errors"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main(list(map(str, args)))
    return code, out.getvalue(), err.getvalue()


def test_a_cut_file_is_found_by_decoding():
    with tempfile.TemporaryDirectory() as d:
        root = miniature(d, classes=2, per_class=2)
        cut = root/'food-101/images/waffles/1003.jpg'
        cut.write_bytes(cut.read_bytes()[:300])
        bad, = damaged(find('Food', root, check=False))
        assert bad.startswith(f'{cut}: ') and damaged(find('MNIST', root, check=False)) == []
        code, out, _ = run('status', '--root', root, '--no-check', '--decode', 'Food', 'MNIST')
        assert code == 1 and '1 images cannot be decoded' in out and str(cut) in out


def test_failures_become_messages_and_the_others_go_on():
    def no_network(*args, **kwargs): raise URLError('Temporary failure in name resolution')
    modules = 'fgvc_aircraft caltech cifar dtd eurosat flowers102 food101 mnist oxford_iiit_pet sun397'.split()
    with tempfile.TemporaryDirectory() as d, contextlib.ExitStack() as stack:
        for m in modules:
            fetching = f'torchvision.datasets.{m}.download_and_extract_archive'
            stack.enter_context(patch(fetching, side_effect=no_network))
        code, out, err = run('prepare', '--root', d)
        assert code == 1 and not err
        for n in MTIL:
            assert f'{n} is not complete: missing: ' in out and f'needed in {d}: {MTIL[n].files}' in out, n
        assert out.count('the download failed: ') == 10 and 'name resolution' in out
        assert 'StanfordCars: must be fetched by hand' in out and 'kaggle.com' in out
        assert 'left over from an interrupted download' in out # Caltech101's folder, which torchvision makes first


def test_a_download_that_works_is_checked():
    small = MTIL['DTD']._replace(n_classes=2, n_train=4, n_test=4)
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        made = miniature(a, classes=2, per_class=2)
        def fetch(url, download_root, **kwargs): # in place of the network
            shutil.copytree(made/'dtd/dtd', Path(download_root)/'dtd')
        fetching = patch('torchvision.datasets.dtd.download_and_extract_archive', side_effect=fetch)
        fetched = stack.enter_context(fetching)
        stack.enter_context(patch.dict(MTIL, DTD=small))
        assert run('status', '--root', b, 'DTD')[0] == 1 and not os.listdir(b)
        code, out, _ = run('prepare', '--root', b, 'DTD')
        assert code == 0 and 'DTD: complete' in out and fetched.call_count == 1
        assert run('prepare', '--root', b, 'DTD')[0] == 0 and fetched.call_count == 1 # nothing is fetched twice
        assert run('status', '--root', b, 'DTD')[0] == 0
        (Path(b)/'dtd/dtd/images/banded/banded_0000.jpg').unlink()
        code, out, _ = run('prepare', '--root', b, 'DTD')
        assert code == 1 and '1 images are listed but not there' in out and 'delete it' in out


def test_status_of_a_miniature_and_of_nothing():
    with tempfile.TemporaryDirectory() as d:
        tiny, empty = Path(d)/'tiny', Path(d)/'empty'
        code, out, _ = run('miniature', tiny, '--classes', 2, '--per-class', 2)
        assert code == 0 and '11 datasets' in out
        code, out, _ = run('status', '--root', tiny, '--no-check')
        assert code == 0 and out.count('readable') == 11 and '4 / 3334' in out
        code, out, _ = run('status', '--root', tiny)
        assert code == 1 and '11 of 11 are not complete' in out
        assert '2 classes, should be 100 (and 2 more)' in out and 'cannot read it' in out
        code, out, _ = run('status', '--root', empty)
        assert code == 1 and out.count('missing') == 11 and '- / 3334' in out and not empty.exists()
        code, out, _ = run('status', '--root', tiny, '--no-check', 'MNIST', 'Food')
        assert code == 0 and 'Food' in out and 'SUN397' not in out
        code, _, err = run('miniature', tiny)
        assert code == 1 and 'already' in err


def test_wrong_arguments_are_explained():
    code, out, err = run('status', 'Cars')
    assert code == 1 and 'no dataset is called Cars; choose among Aircraft' in err and not out
    for argv in ([], ['fetch'], ['miniature']):
        with pytest.raises(SystemExit) as e, contextlib.redirect_stderr(io.StringIO()): main(argv)
        assert e.value.code == 2
    assert check_names([]) == list(MTIL) and check_names(['Food', 'DTD']) == ['DTD', 'Food']
    assert download('StanfordCars', 'nowhere') == 'torchvision has no link for it' and not os.path.exists('nowhere')
