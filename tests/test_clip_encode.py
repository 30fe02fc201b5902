import pytest, torch
from torch.nn import functional as F
from moe_merge_nb.clip.backbone import load_clip, pico, towers
from moe_merge_nb.clip.encode import *


def test_a_frozen_product_is_the_product_in_both_directions():
    layer, x = torch.nn.Linear(48, 32).requires_grad_(False), torch.randn(3, 5, 48, requires_grad=True)
    def slope(y): return torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0]
    assert by_onednn(x, layer.weight, layer.bias) == hasattr(torch.ops.mkldnn, '_linear_pointwise')
    for rows in (x, x[:, :1], x.mT.contiguous().mT):
        found, wanted = (f(rows, layer.weight, layer.bias) for f in (linear, F.linear))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(slope(found), slope(wanted))


def test_what_is_not_frozen_single_precision_takes_the_usual_way():
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    assert not by_onednn(x, layer.weight, layer.bias)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    assert not by_onednn(x.double(), layer.double().weight, layer.bias)
    assert not by_onednn(x.to('meta'), layer.float().weight, None)
    with torch.autocast('cpu', torch.bfloat16): assert linear(x, layer.weight, layer.bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False): assert not by_onednn(x, layer.weight, layer.bias)


def test_attention_is_multihead_attention_for_all_queries_and_for_some():
    attn = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    for m in (None, mask):
        wanted = attn(x, x, x, need_weights=False, attn_mask=m)[0]
        y = x.clone().requires_grad_()
        torch.testing.assert_close(attention(attn, y, y, m), wanted)
        some = attention(attn, x[:, 2:5], x, None if m is None else m[2:5])
        torch.testing.assert_close(some, wanted[:, 2:5])


def test_quick_gelu_is_a_silu():
    from collections import OrderedDict
    from open_clip.transformer import QuickGELU
    parts = OrderedDict(c_fc=torch.nn.Linear(8, 32), gelu=QuickGELU(), c_proj=torch.nn.Linear(32, 8))
    layers, g = torch.nn.Sequential(parts).double(), torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=g, dtype=torch.float64).requires_grad_()
    y = x.detach().clone().requires_grad_()
    mlp(layers, x).square().sum().backward()
    layers(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_single_precision_differs_from_open_clip_in_its_last_digits_only():
    clip, tokenizer = load_clip('toy', 'random')
    images = torch.randn(4, 3, 32, 32)
    tokens = tokenizer(['a photo of a fox.', 'a ' * 30])                        # the last one fills the context
    def close(found, wanted): torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(plain_text(clip, tokens), clip.encode_text(tokens))
        for pooled in (True, False):
            close(encode_image(clip, images, pooled=pooled), clip.encode_image(images))
            close(encode_text(clip, tokens, pooled=pooled), clip.encode_text(tokens))


def test_leaving_out_what_nobody_reads_changes_no_feature():
    clip, tokenizer = load_clip('toy', 'random')
    clip.double().attn_mask = clip.attn_mask.double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    tokens = tokenizer(['a photo of a fox.', 'a photo of a helicopter, a type of aircraft.', 'a ' * 30])
    def close(found, wanted): torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    for add in (None, lambda x: x.sin()):
        image, text = ([add] * len(blocks) if add else None for blocks in towers(clip).values())
        close(encode_image(clip, images, image), encode_image(clip, images, image, pooled=False))
        for n in (1, 2, 3):
            close(encode_text(clip, tokens[:n], text), encode_text(clip, tokens[:n], text, pooled=False))
            if not add: close(encode_text(clip, tokens[:n]), clip.encode_text(tokens[:n]))


def test_gradients_are_those_of_open_clip():
    clip, tokenizer = load_clip('toy', 'random')
    images, tokens = torch.randn(4, 3, 32, 32), tokenizer(['a photo of a fox.', 'two dogs'])
    clip.requires_grad_(True)                                                   # full fine-tuning
    def gradients(features):
        clip.zero_grad()
        features.square().sum().backward()
        return {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}
    def same(ours, theirs):
        found, wanted = gradients(ours), gradients(theirs)
        assert found.keys() == wanted.keys()
        for n, g in wanted.items(): assert (found[n] - g).norm() <= 1e-5 * g.norm() + 1e-6, n
    same(encode_image(clip, images), clip.encode_image(images))
    same(encode_text(clip, tokens), clip.encode_text(tokens))
