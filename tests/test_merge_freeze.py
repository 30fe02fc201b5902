import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.merge.usage import *
from moe_merge_nb.merge.freeze import *


def test_frozen_is_closed_and_only_ever_grows():
    model = AdaptedCLIP(load_clip('toy', 'random')[0], n_experts=6, rank=4); model.add_task()
    keys, frozen = [(m.tower, m.block) for m in model.moes], torch.zeros(6, dtype=torch.bool)
    torch.manual_seed(0)
    for _ in range(4):
        freeze_most_used(model, {k: torch.randint(0, 9, (6,)) for k in keys})
        trainable(model)
        now = model.moes[0].frozen
        assert (now | ~frozen).all()
        for closed, x in zip(now, model.moes[0].experts):
            assert all(p.requires_grad == (not closed) for p in x.parameters())
        frozen = now.clone()
    assert frozen.sum() > 2


def test_a_closed_task_selects_only_what_is_frozen():
    net = AdaptedCLIP(load_clip('toy', 'random')[0], n_experts=6, rank=4)
    for usage in ([1, 5, 0, 7, 2, 2], [9, 0, 0, 8, 1, 1]):
        net.add_task()
        close_routers(net, {(m.tower, m.block): torch.tensor(usage) for m in net.moes})
        freeze_open(net)
    for m in net.moes:
        assert m.frozen.nonzero().flatten().tolist() == [0, 1, 3]
        assert [(~r.closed).nonzero().flatten().tolist() for r in m.routers] == [[1, 3], [0, 1, 3]]
