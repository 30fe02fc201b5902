import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.features import Encoder, class_embeddings
from moe_merge_nb.learn.views import *
from moe_merge_nb.streams.tasks import stack, toy_stream


def test_plain_logits_are_those_of_clip():
    (net, tok), task = load_clip('toy', 'random'), toy_stream(1)[0]
    net = AdaptedCLIP(net, n_experts=4, rank=4).eval()
    encoder = Encoder(net, tok, batch=7)
    images, labels = stack(task.test)
    p = plain_pass(encoder, task)
    z, w = net.clip.encode_image(images), class_embeddings(net, tok, task)
    by_hand = net.logit_scale.exp()*z/z.norm(dim=1, keepdim=True) @ w.T
    torch.testing.assert_close(p['logits'], by_hand, rtol=1e-4, atol=1e-4)
    assert (p['labels'] == labels).all()
    odd = plain_pass(Encoder(net, tok), task, index=torch.arange(1, 24, 2))
    torch.testing.assert_close(odd['features'], p['features'][1::2], rtol=1e-4, atol=1e-4)
    assert (odd['labels'] == labels[1::2]).all()
