import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.rewrites.bank import bank, banks
from moe_merge_nb.rewrites.statistics import *


def test_usage_adds_up():
    torch.manual_seed(0)
    clip, tokenizer = load_clip(pretrained='random')
    stream, net = toy_stream(n_tasks=2), AdaptedCLIP(clip, n_experts=5, rank=3).eval()
    for _ in stream: net.add_task()
    for p in net.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    found = calibrate(net, tokenizer, stream, images=10)
    for moe, s in zip(net.moes, found, strict=True):
        n = 20 if moe.tower == 'image' else sum(len(t.classes) for t in stream)
        assert s.counts.sum() == 2*n and len(s.task) == len(s.label) == n
        torch.testing.assert_close(s.mass.sum(), torch.tensor(float(n)))
        assert torch.equal(s.together, s.together.T) and torch.equal(s.together.diag(), s.counts)
        torch.testing.assert_close(affinity(s.gates, s.task, 2).sum(1), torch.ones(2))
        assert ((s.peak > 0) == (s.counts > 0)).all()


def test_every_expert_is_most_like_itself():
    torch.manual_seed(0)
    t, Y3 = torch.randn(20, 8), torch.randn(3, 20, 8)
    Y3[2] = 5 * Y3[0]
    S = output_similarity(Y3)
    torch.testing.assert_close(S.diag(), torch.ones(3))
    torch.testing.assert_close(S[0, 2], torch.tensor(1.))
    assert abs(S[0, 1]) < .3
