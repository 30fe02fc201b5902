import random
import numpy as np
import pytest, torch
from torch.utils.data import Dataset
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.safe.batches import *
class Noisy(Dataset):
    "Ten pictures that look different every time."
    def __len__(self): return 10
    def __getitem__(self, i): return torch.rand(3, 4, 4) + np.random.rand() + random.random(), i


def test_what_is_drawn_inside_depends_on_the_seed_alone():
    def outside(): return float(torch.rand(())), np.random.rand(), random.random()
    def inside(*seed):
        with drawing(*seed): return outside()
    def begin():
        for f in (torch.manual_seed, np.random.seed, random.seed): f(5)
    begin()
    a, x = inside(1, 2), outside()
    begin()
    assert x == outside() and a == inside(1, 2)
    assert len(set(a + inside(1, 3) + inside(2, 2))) == 9


def test_the_batches_are_the_same_from_any_process_and_from_any_start():
    def same(some, others): return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
    batches, order = Batches(Noisy(), 0), list(batch_indices(10, 3, 5, seed=0))
    straight = list(loader(batches, order))
    for first, workers in ((0, 2), (2, 0), (3, 1)):
        others = loader(batches, order, first, workers)
        for batch, other in zip(straight[first:], others, strict=True): assert same(batch, other)
    another_seed = next(iter(loader(Batches(Noisy(), 1), order)))
    assert not torch.equal(straight[0][0], another_seed[0])


def test_images_in_memory_are_loaded_as_before():
    images = toy_stream(1)[0].train
    order = list(batch_indices(len(images), 5, 4, 0))
    torch.manual_seed(0)
    old = list(torch.utils.data.DataLoader(images, batch_sampler=order))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    new = list(loader(Batches(images, 0), order))
    assert torch.equal(after, torch.get_rng_state())
    for (x, y), (x_, y_) in zip(old, new, strict=True):
        assert torch.equal(x, x_) and torch.equal(y, y_)
        assert y.dtype == y_.dtype
