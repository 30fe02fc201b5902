import numpy as np, pytest, shutil, tempfile, torch
from pathlib import Path
from moe_merge_nb.streams.mini import DOMAINS, ORDERS, mini


def test_no_digit_is_in_both_pools():
    from moe_merge_nb.streams.mini import digit_pools
    train, test = (set(map(bytes, p.reshape(-1, 784))) for p in digit_pools())
    assert len(train) == 4000 and len(test) == 1000 and not train & test


def test_splits_are_balanced_and_follow_the_data_seed():
    from moe_merge_nb.streams.mini import draw_split
    def differ(a, b): return (a != b).any((1, 2, 3)).mean() > .9
    for name, d in DOMAINS.items():
        (a, la), (b, lb) = (draw_split(name, 0, 33) for _ in range(2))
        other_seed, other_split = draw_split(name, 0, 33, data_seed=1)[0], draw_split(name, 1, 33)[0]
        assert a.shape == (33, 3, 32, 32) and a.dtype == np.uint8
        assert (a == b).all() and (la == lb).all(), name
        assert differ(a, other_seed) and differ(a, other_split), name
        counts = np.bincount(la, minlength=len(d.split()))
        assert counts.max() - counts.min() <= 1 and counts.sum() == 33


def test_the_second_call_reads_the_cache_and_gives_the_same_stream():
    def same(a, b, split): return torch.equal(getattr(a, split).images, getattr(b, split).images)
    with tempfile.TemporaryDirectory() as d:
        a, b = (mini(n_train=40, n_test=20, cache=d) for _ in range(2))
        assert [p.name for p in Path(d).iterdir()] == ['mini-v2-seed0-40-20.safetensors']
        c = mini(n_train=40, n_test=30, cache=d) # more test images
        other = mini(data_seed=1, n_train=40, n_test=20, cache=d)
    for ta, tb, tc, to in zip(a, b, c, other):
        assert same(ta, tb, 'train') and same(ta, tb, 'test') and torch.equal(ta.train.labels, tb.train.labels)
        assert same(ta, tc, 'train') and len(tc.test) == 30
        assert not same(ta, to, 'train') and not same(ta, to, 'test')


def test_a_damaged_cache_is_drawn_again():
    with tempfile.TemporaryDirectory() as d:
        a = mini(n_train=20, n_test=5, cache=d)
        file, = Path(d).iterdir()
        content = file.read_bytes()
        flipped = content[:5001] + bytes(b ^ 255 for b in content[5001:5100]) + content[5100:]
        for damage in (content[:len(content)//2], b'', b'no tensors', flipped):
            file.write_bytes(damage)
            with pytest.warns(UserWarning, match='damaged.*It is drawn again'): b = mini(n_train=20, n_test=5, cache=d)
            assert all(torch.equal(x.train.images, y.train.images) for x, y in zip(a, b))
            assert file.stat().st_size == len(content)
        assert list(Path(d).iterdir()) == [file]


def test_a_cache_that_vanished_is_drawn_again():
    with tempfile.TemporaryDirectory() as d:
        cache = Path(d)/'cache'
        a = mini(n_train=20, n_test=5, cache=cache)
        shutil.rmtree(cache)
        b = mini(n_train=20, n_test=5, cache=cache)
        assert all(torch.equal(x.train.images, y.train.images) for x, y in zip(a, b))
        assert len(list(cache.iterdir())) == 1


def test_order_two_is_a_permutation_of_order_one():
    with tempfile.TemporaryDirectory() as d:
        one, two = (mini(order=o, n_train=20, n_test=5, cache=d) for o in (1, 2))
    assert one.names == list(DOMAINS) == list(ORDERS[1])
    assert two.names == list(ORDERS[2]) and sorted(two.names) == sorted(one.names)
    assert two.names[:3] == ['Cars', 'Food', 'MNIST']
    by_name = {t.name: t for t in one}
    assert all(torch.equal(t.test.images, by_name[t.name].test.images) for t in two)


def test_shots_keeps_that_many_of_each_class_and_fewer_shots_are_among_more():
    def images_of(task): return {x.numpy().tobytes() for x in task.train.images}
    with tempfile.TemporaryDirectory() as d:
        full, three, one = (mini(n_train=80, n_test=5, shots=k, cache=d) for k in (None, 3, 1))
        with pytest.raises(ValueError, match='shots is 5'): # 20 classes: 4 each
            mini(n_train=80, n_test=5, shots=5, cache=d)
    for f, t, o in zip(full, three, one):
        assert t.train.labels.bincount().tolist() == [3]*len(t.classes) and torch.equal(t.test.images, f.test.images)
        assert images_of(o) <= images_of(t) <= images_of(f)


def test_impossible_sizes_are_refused():
    wrong = [
        (dict(order=3), 'order is 3'),
        (dict(n_train=10), 'n_train is 10'),
        (dict(n_train=5000), '4000'),
        (dict(n_test=0), 'n_test is 0'),
        (dict(n_test=1001), '1000'),
        (dict(data_seed=-1), 'data_seed')]
    for change, words in wrong:
        with pytest.raises(ValueError, match=words): mini(**change)
