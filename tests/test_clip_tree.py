import pytest, torch
from torch.nn import functional as F
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.clip.encode import encode_text
from moe_merge_nb.clip.tree import *


def test_every_prompt_is_a_path_of_the_tree():
    _, tokenizer = load_clip('toy', 'random')
    tokens = tokenizer(['a photo of a cat.', 'a photo of a dog.', 'a photo of a dog', 'a drawing of a cat.'])
    t, prefixes = tree(tokens), set()
    for prompt, end in zip(tokens, t.ends):
        path = t.sees[end].nonzero().flatten()                          # parents come before children
        n = int(prompt.argmax()) + 1
        assert len(path) == n and t.depth[path].tolist() == list(range(n))
        assert t.token[path].tolist() == prompt[:n].tolist()
        prefixes |= {tuple(prompt[:i + 1].tolist()) for i in range(n)}
    assert len(t.token) == len(prefixes)


def test_parts_hold_every_prompt_once_and_keep_to_the_limit():
    _, tokenizer = load_clip('toy', 'random')
    THINGS = 'cat dog car cup tree'.split()
    tokens = tokenizer([f'a {kind} of a {thing}.' for kind in ('photo', 'drawing', 'sketch') for thing in THINGS])
    def nodes(prompts): return len(tree(tokens[prompts]).token)
    for most in (1, 12, 20, 35, 1000):
        found = parts(tokens, most)
        assert sorted(i for p in found for i in p) == list(range(15))
        assert all(nodes(p) <= most or len(p) == 1 for p in found)
    assert len(parts(tokens, 1)) == 15 and len(parts(tokens, 1000)) == 1
    found = parts(tokens, 20)
    assert all(nodes(p + q[:1]) > 20 for p, q in zip(found, found[1:]))  # no room was left


def test_a_tree_says_what_the_text_tower_says():
    clip, tokenizer = load_clip('pico')
    KINDS = ('photo', 'blurry photo', 'drawing')
    THINGS = ('a cat', 'a dog', 'a large dog', 'two cups', 'the letter q', 'a cat')
    tokens = tokenizer([f'a {kind} of {thing}.' for kind in KINDS for thing in THINGS])
    with torch.no_grad():
        plain = F.normalize(clip.encode_text(tokens), dim=-1)
        for most in (1, 30, 384):
            assert (F.normalize(encode_prompts(clip, tokens, most=most), dim=-1) - plain).abs().max() < 1e-6


def test_a_tree_is_routed_as_its_prompts_are():
    clip, tokenizer = load_clip('pico')
    tokens = tokenizer(['a photo of a cat.', 'a photo of a large dog.', 'two cups', 'two cups of tea'])
    torch.manual_seed(0)
    W = [torch.randn(x.ln_2.normalized_shape[0]) for x in clip.transformer.resblocks]
    adapters = [lambda x, w=w: .3 * x * (x[:, :1] @ w).sigmoid()[..., None] for w in W]
    with torch.no_grad():
        mixed = F.normalize(encode_text(clip, tokens, adapters), dim=-1)
        assert (F.normalize(encode_prompts(clip, tokens, adapters), dim=-1) - mixed).abs().max() < 1e-6
        assert (mixed - F.normalize(encode_text(clip, tokens), dim=-1)).abs().max() > 1e-2
