import copy, pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip, pico
from moe_merge_nb.run.describe import *


def test_the_arguments_are_read_back_from_the_model():
    for options in (
        dict(n_experts=3, rank=5, top_k=1, scale=0.7, dropout=0., shared_init=True),
        dict(n_experts=4, rank=2, gate='top_p', top_p=0.6),
        dict(n_experts=4, rank=2, expert='norm', router='mlp', options=dict(router=dict(hidden=7)), shared_blocks=1),
    ):
        config = experts_config(AdaptedCLIP(pico(), **options))
        assert options.items() <= config.items()
        assert experts_config(AdaptedCLIP(pico(), **config)) == config


def test_an_architecture_comes_back_from_its_description():
    vision = dict(image_size=[16, 24], patch_size=8, width=32, layers=2, head_width=8, mlp_ratio=3.)
    text = dict(context_length=9, vocab_size=50, width=48, layers=3, heads=3, mlp_ratio=2.)
    config = dict(embed_dim=24, quick_gelu=True, vision_cfg=vision, text_cfg=text)
    clip = clip_from(config)
    assert clip_config(clip) == config
    other = copy.deepcopy(clip)
    assert sha256(clip) == sha256(other)
    other.ln_final.bias.data[3] += 1e-6
    assert sha256(clip) != sha256(other)


def test_a_backbone_with_other_parts_is_refused():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    vision = dict(image_size=16, patch_size=8, width=32, layers=1, head_width=8)
    text = dict(context_length=9, vocab_size=50, width=32, layers=1, heads=2)
    for v, t in (
        (dict(pool_type='avg'), {}),
        ({}, dict(pool_type='last')),
        (dict(no_ln_pre=True), {}),
        (dict(norm_kwargs=dict(eps=1e-3)), {}),
        ({}, dict(no_causal_mask=True)),
        (dict(ls_init_value=0.1), {}),
    ):
        odd = lambda: CLIP(16, CLIPVisionCfg(**vision, **v), CLIPTextCfg(**text, **t))
        with pytest.raises(ValueError, match='cannot be described|is supported'): clip_config(odd())
