"""Images that lie in one tensor are read where they lie, and mean what they mean one by one."""
import torch
from torch.utils.data import Dataset
from moe_merge_nb.streams.given import Row, chunks, listed

def batch(n=5): return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def test_neighbours_are_not_copied():
    x = batch()
    [whole] = chunks(listed(x), 32)
    assert whole.images.data_ptr() == x.data_ptr() and whole.paths == [f'image {i}' for i in range(5)]
    [some] = chunks(listed(x)[1:4], 32)
    assert some.images.data_ptr() == x[1].data_ptr() and len(some) == 3

def test_any_other_order_is_what_was_asked_for():
    x, y = batch(), batch() + 1
    backwards, mixed = listed(x)[::-1], [*listed(x)[:2], *listed(y)[:2]]
    [a], [b] = chunks(backwards, 32), chunks(mixed, 32)
    assert torch.equal(a.images, x.flip(0)) and torch.equal(b.images, torch.cat([x[:2], y[:2]]))

def test_what_has_to_be_changed_is_changed():
    pale = (batch().sigmoid()*255).to(torch.uint8)
    [whole], [single] = chunks(listed(pale), 32), chunks(listed(list(pale)), 32)
    assert torch.equal(whole.images, single.images) and whole.images.dtype == torch.float32
    [half] = chunks(listed(batch().double()), 32)
    assert half.images.dtype == torch.float32 and torch.equal(half.images, batch().double().float())

def test_nan_among_rows_is_named_and_left_out():
    x = batch()
    x[2, 0, 3, 4] = torch.nan
    [found] = chunks(listed(x), 32)
    assert list(found.bad) == ['image 2'] and torch.equal(found.images, x[[0, 1, 3, 4]])
    [all_bad] = chunks(listed(torch.full((2, 3, 32, 32), torch.inf)), 32)
    assert len(all_bad) == 0 and len(all_bad.bad) == 2

def test_a_data_set_is_its_images_with_and_without_labels():
    class Labelled(Dataset):
        def __len__(self): return 3
        def __getitem__(self, i): return batch()[i], 7
    class Plain(Labelled):
        def __getitem__(self, i): return batch()[i]
    for data in (Labelled(), Plain()):
        [found] = chunks(listed(data), 32)
        assert torch.equal(found.images, batch(3)) and isinstance(listed(data)[0].holds, Row)
