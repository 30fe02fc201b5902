import pytest, torch
from torch.nn import functional as F
from moe_merge_nb.select.text_space import TextSpace


def test_the_largest_cosine_among_accepting_tasks_wins():
    a, b = torch.tensor([[1., 0, 0], [0, 1, 0]]), torch.tensor([[0., 0, 1]])
    g = torch.Generator().manual_seed(0)
    near = lambda v: v + .1*torch.randn(200, 3, generator=g)
    s = TextSpace().fit(near(a[0]), texts=a).fit(near(b[0]), texts=b)
    x = torch.tensor([[5., 0, 0], [0, .1, 0], [0, 0, 3], [-1, 0, 0]])
    assert s.select(x).tolist() == [0, 0, 1, -1]                    # lengths do not matter
    s.thresholds = torch.tensor([.9, .4])                           # two ranges that overlap
    x = torch.tensor([[.6, 0, .8], [.8, 0, .6], [1, 0, 1.01]])      # cosines .6/.8, .8/.6, .70/.71
    assert s.select(x).tolist() == [1, 0, 1]
    assert s.scores(x).argmin(1).tolist() == [0, 0, 0]              # what dividing by the threshold would say


def test_the_order_of_tasks_changes_nothing_but_their_numbers():
    g = torch.Generator().manual_seed(0)
    w = [F.normalize(torch.randn(4, 8, generator=g), dim=-1) for _ in range(3)]
    x = [torch.cat([v + .3*torch.randn(30, 4, 8, generator=g)]).flatten(0, 1) for v in w]
    def fitted(order):
        s = TextSpace(held_out=.999, most=1000) # nearly all give the threshold: the split does not matter
        for t in order: s.fit(x[t], texts=w[t])
        return s
    a, b = fitted([0, 1, 2]), fitted([2, 0, 1])
    new = torch.randn(500, 8, generator=g)
    assert a.thresholds[[2, 0, 1]].allclose(b.thresholds) and len(a.select(new).unique()) == 4
    assert (torch.tensor([1, 2, 0, -1])[a.select(new)] == b.select(new)).double().mean() > .99


def test_a_restored_text_selector_is_the_same():
    g = torch.Generator().manual_seed(0)
    w = [F.normalize(torch.randn(4, 8, generator=g), dim=-1) for _ in range(2)]
    x, new = torch.randn(50, 10, generator=g), torch.randn(300, 10, generator=g)
    s = TextSpace().fit(x, texts=w[0])
    r = TextSpace().restore(s.state())
    for both in (s, r): both.fit(x + 1, texts=w[1])
    assert (s.select(new) == r.select(new)).all() and len(s.select(new).unique()) > 1
