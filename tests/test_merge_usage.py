import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.moe import *
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.merge.usage import *


def test_nobody_counts_who_was_not_asked():
    model, usage = AdaptedCLIP(load_clip('toy', 'random')[0], n_experts=6, rank=4), Usage()
    model.add_task()
    model.encode_image(torch.randn(2, 3, 32, 32), 0, probe=usage)
    before = {k: c.clone() for k, c in usage.counts.items()}
    model.encode_image(torch.randn(2, 3, 32, 32), 0)
    model.encode_image(torch.randn(2, 3, 32, 32), None, probe=usage)
    assert all(torch.equal(before[k], c) for k, c in usage.counts.items())
