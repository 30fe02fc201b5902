import numpy as np, pytest, torch
from moe_merge_nb.streams.tasks import STREAMS, Images, Stream, Task, first, reorder, stack, toy_stream


def test_a_batch_is_the_single_images_stacked():
    rng = np.random.default_rng(0)
    six = Images(rng.integers(0, 256, (6, 3, 4, 4), dtype='uint8'), range(6))
    for (a, la), i in zip(six.__getitems__([4, 0, 5]), [4, 0, 5]):
        b, lb = six[i]
        assert torch.equal(a, b) and la == lb == i
    mu = torch.tensor([.48145466, .4578275, .40821073]).view(3, 1, 1)
    sigma = torch.tensor([.26862954, .26130258, .27577711]).view(3, 1, 1)
    assert torch.equal(((six[2][0]*sigma + mu) * 255).round().byte(), six.images[2]) # the way back


def test_impossible_tasks_are_refused():
    def blank(labels): return Images(np.zeros((len(labels), 3, 8, 8), 'uint8'), labels)
    good = dict(name='Pets', classes=['cat', 'dog'], templates=['a {}.'], train=blank([0, 1]), test=blank([0, 1]))
    assert Task(**good).classes == ('cat', 'dog')
    wrong = [
        (dict(classes=[]), '0 classes'),
        (dict(classes=['cat', 'cat']), 'cat'),
        (dict(classes='cat'), 'tuple'),
        (dict(classes=['cat', 'caf\udce9']), 'no Unicode text'),
        (dict(classes=['cat', ' ']), 'blank'),
        (dict(classes=['cat', 3]), 'is no name'),
        (dict(templates=[]), '0 templates'),
        (dict(templates=['a photo.']), '0 gaps'),
        (dict(templates=['a {} {}.']), '2 gaps'),
        (dict(test=blank([])), 'test has 0 images'),
        (dict(train=blank([])), 'train has 0 images'),
        (dict(calibration=blank([0])), 'calibration has 1 images; it needs the 2'),
        (dict(name='Pets\r'), 'control character'),
        (dict(name='Pets\udce9'), 'no Unicode text'),
        (dict(classes=['cat']), r'labels of train are 0 \.\.\. 1; with 1 classes they must be 0 \.\.\. 0'),
        (dict(test=blank([-100, 0])), 'labels of test are -100')]
    for change, words in wrong:
        with pytest.raises(ValueError, match=words) as e: Task(**(good | change))
        assert 'Pets' in str(e.value)


def test_orders_are_permutations_and_prefixes_are_in_range():
    s = toy_stream()
    names = s.names[::-1]
    assert reorder(s, names).names == names and reorder(s, names)[0] is s[-1]
    assert first(s, 2).names == s.names[:2]
    for wrong in (s.names[:2], [*s.names, s.names[0]], [*s.names[:2], 'Martians']):
        with pytest.raises(ValueError, match='permutation'): reorder(s, wrong)
    for n in (0, 4):
        with pytest.raises(ValueError, match='1 to 3'): first(s, n)
    with pytest.raises(ValueError, match='0 tasks'): Stream('empty', ())
    with pytest.raises(ValueError, match='same name'): Stream('twins', (s[0], s[0]))


def test_a_seed_gives_the_same_toy_stream_and_another_seed_another():
    a, b, c = toy_stream(seed=0), toy_stream(seed=0), toy_stream(seed=1)
    for ta, tb, tc in zip(a, b, c):
        assert torch.equal(ta.train.images, tb.train.images) and torch.equal(ta.test.images, tb.test.images)
        assert not torch.equal(ta.train.images, tc.train.images)
        assert not torch.equal(ta.train.images[:24], ta.test.images)
        assert ta.train.labels.bincount().tolist() == [16, 16, 16] and ta.test.labels.bincount().tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match='n_tasks is 7'): toy_stream(n_tasks=7)
    assert len(toy_stream(n_tasks=6, n_classes=6)) == 6
