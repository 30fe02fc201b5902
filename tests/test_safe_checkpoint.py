import json
import pytest, torch
from safetensors.torch import save_file
from moe_merge_nb.safe.checkpoint import *


def test_a_tree_comes_back_as_it_was():
    import tempfile
    b = dict(weights=torch.arange(6.).view(2, 3)[:, ::2], empty={}, n=torch.tensor([1, 2]))
    tree = dict(a=[1, 2.5, None, True, 'x', []], b=b, tensor='a key of this name', dict=dict(dict=1))
    with tempfile.TemporaryDirectory() as d: back = read_tree(write_tree(tree, f'{d}/deep/c.safetensors'))
    assert torch.equal(back['b']['weights'], b['weights']) and torch.equal(back['b']['n'], b['n'])
    assert back['b']['n'].dtype == torch.int64
    strip = lambda t: {**t, 'b': {**t['b'], 'weights': 0, 'n': 0}}
    assert strip(back) == strip(tree)


def test_what_is_no_checkpoint_is_refused_by_name():
    import tempfile
    from pathlib import Path
    def refused(path):
        with pytest.raises(ValueError, match=f'{path.name} is no checkpoint, or damaged'): read_tree(path)
    ODD = [
        ('{"tensor": ["t0"]}', {}),
        ('{"dict": [1]}', {}),
        ('{"tensor": "t0", "dict": {}}', {}),
        ('{}', {}),
        ('[' * 10**5, {}),
        ('1', dict(t0=torch.ones(1))),
        ('{"tensor": "t0"}', {}),
    ]
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'file.safetensors'
        whole = write_tree(dict(w=torch.ones(1000)), path).read_bytes()
        for content in (b'', b'{"a": 1}', whole[:-100]):
            path.write_bytes(content)
            refused(path)
        save_file(dict(w=torch.ones(2)), path)                                      # of another program
        refused(path)
        for tree, tensors in ODD:
            save_file(tensors, path, dict(format=FORMAT, tree=tree, sha256=checksum(tree, tensors)))
            refused(path)
        with pytest.raises(FileNotFoundError): read_tree(f'{d}/none.safetensors')
    for bad in (dict(f=print), {1: 2}, [object()]):
        with pytest.raises(TypeError): flatten(bad, {})


def test_a_flipped_bit_anywhere_is_found():
    import tempfile
    tree = dict(n=1, weights=torch.arange(40.), text='x')
    with tempfile.TemporaryDirectory() as d:
        path = write_tree(tree, f'{d}/c.safetensors')
        data = path.read_bytes()
        for at in range(len(data)):
            bad = bytearray(data)
            bad[at] ^= 1
            path.write_bytes(bad)
            try: back = read_tree(path)
            except ValueError as e: assert 'c.safetensors is no checkpoint, or damaged' in str(e)
            else:                                                                   # a space became a line break
                assert torch.equal(back.pop('weights'), tree['weights'])
                assert back == dict(n=1, text='x'), at


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used():
    import tempfile
    from pathlib import Path
    says = 'c.safetensors is no checkpoint, or damaged.*Going on from the one before, .*c.before.safetensors'
    for ruin in (lambda b: b[:-7], lambda b: b[:300] + bytes([b[300] ^ 8]) + b[301:], lambda b: b''):
        with tempfile.TemporaryDirectory() as d:
            path = Path(d)/'c.safetensors'
            for n in range(3): write_newest(dict(n=n, w=torch.ones(100)*n), path)
            assert read_newest(path)['n'] == 2
            path.write_bytes(ruin(path.read_bytes()))
            with pytest.warns(UserWarning, match=says): assert read_newest(path)['n'] == 1
            assert sorted(p.name for p in Path(d).iterdir()) == ['c.before.safetensors', 'c.damaged.safetensors']
            assert read_newest(path)['n'] == 1
            write_newest(dict(n=2), path)
            assert read_newest(path)['n'] == 2 and read_tree(other(path, 'before'))['n'] == 1


def test_without_an_intact_checkpoint_nothing_is_begun_again_in_silence():
    import tempfile
    from pathlib import Path
    says = ('no other one is intact: nothing can be continued here. '
            'Remove .*c.safetensors and .*c.before.safetensors to start anew')
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'c.safetensors'
        assert read_newest(path) is None
        for n in range(2): write_newest(dict(n=n), path)
        for p in Path(d).iterdir(): p.write_bytes(p.read_bytes()[:-1])
        with pytest.raises(ValueError, match=says): read_newest(path)
        remove(path)
        assert read_newest(path) is None


def test_killed_between_the_two_names_the_one_before_is_there():
    import tempfile
    from pathlib import Path
    from unittest.mock import patch
    full = patch('moe_merge_nb.safe.files.os.fsync', side_effect=OSError(28, 'No space left on device'))
    says = 'c.safetensors cannot be written .No space left on device'
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'c.safetensors'
        write_newest(dict(n=0), path)
        with full, pytest.raises(OSError, match=says): write_newest(dict(n=1), path)
        assert read_newest(path) == dict(n=0)


def test_tensors_that_do_not_fit_are_named():
    layer, good = torch.nn.Linear(2, 3), dict(weight=torch.zeros(3, 2), bias=torch.ones(3))
    fill(layer, good, 'it')
    assert layer.bias.sum() == 3
    BAD = {
        '1 missing: bias': dict(weight=good['weight']),
        '1 left over: extra': dict(good, extra=torch.ones(1)),
        r'1 of another shape: bias .4,. instead of .3,.': dict(good, bias=torch.ones(4)),
        r'1 of another kind: bias torch.int64 instead of torch.float32': dict(good, bias=torch.ones(3).long()),
        '1 with NaN or infinity: bias': dict(good, bias=torch.full((3,), torch.nan)),
    }
    for says, bad in BAD.items():
        with pytest.raises(ValueError, match=f'it does not fit: {says}'): fill(layer, bad, 'it')
