import torch
from accelerate import Accelerator
from moe_merge_nb.safe.devices import *


def test_shares_are_a_partition_of_every_batch():
    import pytest
    from types import SimpleNamespace
    def one_of(n, i=0): return SimpleNamespace(num_processes=n, process_index=i)
    batches = [list(range(12)), list(range(12, 24))]
    parts = [split_batches(batches, one_of(3, i)) for i in range(3)]
    assert [sum((p[k] for p in parts), []) for k in range(2)] == batches
    assert split_batches(batches, None) is batches
    with pytest.raises(ValueError, match='train.batch is 12 for 5 processes'): split_batches(batches, one_of(5))


def test_parts_of_a_batch_draw_the_noise_of_the_whole():
    from moe_merge_nb.layer.kinds import Experts, make_router
    from moe_merge_nb.layer.router import ROUTERS
    for name in ROUTERS:
        torch.manual_seed(0)
        router, x0 = make_router(Experts(n_experts=5, rank=4, router=name), 8), torch.randn(6, 8)
        for p in router.parameters(): torch.nn.init.normal_(p, std=.1)
        def drawn(rows):
            torch.manual_seed(3)
            return router(rows, True)
        want, found = drawn(x0), []
        for i in range(3):
            with noise_of_the_whole([router], i, 3): found.append(drawn(x0[2*i:2*i + 2]))
        torch.testing.assert_close(torch.cat(found), want)
        assert torch.equal(drawn(x0), want)                                     # outside, nothing is changed


def test_processes_agree_on_gradients_and_counts():
    import tempfile
    def work(path):
        "What each process does; the file says what it ended with."
        accelerator = Accelerator(cpu=True)
        i, ps = accelerator.process_index, [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
        ps[0].grad = torch.full((2,), 2. + 2*i)                                  # 2 and 4: mean 3
        if i == 1: ps[1].grad = torch.full((2,), 8.)                             # none and 8: mean 4
        average_gradients(ps, accelerator)
        counts = {('image', 0): torch.tensor([1, i]), ('text', 0): torch.tensor([5 + i, 0])}
        counts = total_counts(counts, accelerator)
        torch.save([p.grad for p in ps] + list(counts.values()), f'{path}/{i}.pt')
    def ends():
        "Gradients and counts of both processes."
        with tempfile.TemporaryDirectory() as d:
            in_processes(work, d)
            return [torch.load(f'{d}/{i}.pt') for i in range(2)]
    for a, b, none, image, text in ends():
        assert a.tolist() == [3, 3] and b.tolist() == [4, 4] and none is None
        assert image.tolist() == [2, 1] and text.tolist() == [5, 0]
