import pytest
import torch
from torch.nn import functional as F
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.cost.compare import *


def test_of_the_bare_towers_only_two_vectors_are_differentiated():
    case = make_case(load_clip(), classes=3, batch=2, rank=4)
    todo, leaves = [bare_loss(case).grad_fn], {}
    while todo:
        node = todo.pop()
        if hasattr(node, 'variable'): leaves[node] = node.variable
        todo += [n for n, _ in node.next_functions if n is not None]
    assert [tuple(v.shape) for v in leaves.values()] == [(128,), (128,)]
    assert all((v == 0).all() for v in leaves.values())
    train_bare(case)
    assert all(p.grad is None for p in case.model.parameters())


def test_bare_is_plain_clip():
    case = make_case(load_clip(), classes=5, batch=2, rank=4)
    clip = case.model.clip
    def unit(x): return F.normalize(x, dim=-1)
    with torch.no_grad():
        close = dict(rtol=0, atol=1e-6)
        torch.testing.assert_close(unit(see_bare(case)), unit(clip.encode_image(case.images)), **close)
        torch.testing.assert_close(classify_bare(case), unit(clip.encode_text(case.learner.tokens)), **close)
    assert (see_ours(case) - see_bare(case)).abs().max() > 1e-3                # the adapters do something


@pytest.mark.parametrize('job', [train_bare, see_bare])
def test_the_bare_towers_stay_on_the_device_they_are_moved_to(job):
    case, meta = make_case(load_clip('pico', 'random'), 3, 2), torch.device('meta')     # which has shapes, no numbers
    case.model.to(meta)
    case.images, case.labels = case.images.to(meta), case.labels.to(meta)
    case.learner.tokens = case.learner.tokens.to(meta)
    case.learner.first = tuple(t.to(meta) for t in case.learner.first)
    job(case)                                                                           # a tensor left behind raises
