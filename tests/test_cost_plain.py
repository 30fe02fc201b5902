import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.cost.plain import *


def test_without_adapters_the_plain_towers_are_the_models_own():
    clip, tokenizer = load_clip()
    plain = PlainCLIP(clip, 3, 4, 2).eval()
    for moe in [*plain.moes['image'], *plain.moes['text']]:
        for e in moe.experts:
            for p in e.up.parameters(): torch.nn.init.zeros_(p)
    images, tokens = torch.randn(2, 3, 32, 32), tokenizer(['a dog', 'a photo of a cat'])
    torch.testing.assert_close(plain.encode_image(images), clip.encode_image(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.encode_text(tokens), clip.encode_text(tokens), rtol=1e-5, atol=1e-5)
