"""A CLIPModel of transformers becomes open_clip's towers, with the same features; what does not fit is named."""
import sys
from types import SimpleNamespace
import pytest
import torch
from moe_merge_nb.clip.backbone import load_clip, towers
from moe_merge_nb.clip.hf import check_config, convert, load_hf, renamed
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.run.options import composed

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)

@pytest.fixture(scope='module')
def t():
    return pytest.importorskip('transformers')

def made(t, act='quick_gelu', vocab=99, **text):
    "A small CLIPModel; its weights are random, its biases and scales, too."
    both = dict(SIZES, hidden_act=act)
    words = dict(both, vocab_size=vocab, max_position_embeddings=12, bos_token_id=vocab - 2, eos_token_id=vocab - 1)
    config = t.CLIPConfig(
        text_config=words | text,
        vision_config=dict(both, image_size=32, patch_size=8, num_hidden_layers=3),
        projection_dim=16)
    torch.manual_seed(0)
    model = t.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05 * torch.randn_like(p))
    return model

def feature(out): return getattr(out, 'pooler_output', out)                        # transformers 5 wraps it

@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
def test_both_say_the_same_of_images_and_texts(t, act):
    theirs = made(t, act)
    ours, images, tokens = convert(theirs), torch.randn(6, 3, 32, 32), torch.randint(1, 97, (6, 12))
    for row, end in zip(tokens, (3, 5, 7, 9, 10, 11)): row[end], row[end + 1:] = 98, 0
    with torch.no_grad():
        for have, want in ((ours.encode_image(images), feature(theirs.get_image_features(pixel_values=images))),
                           (ours.encode_text(tokens), feature(theirs.get_text_features(input_ids=tokens)))):
            assert have.shape == (6, 16) and (have - want).abs().max() < 1e-5 * want.abs().max()
        logits = theirs(pixel_values=images, input_ids=tokens).logits_per_image
        z, w = ours.encode_image(images, normalize=True), ours.encode_text(tokens, normalize=True)
        assert torch.allclose(ours.logit_scale.exp() * z @ w.T, logits, rtol=1e-4, atol=1e-5)

def test_one_on_the_disk_is_loaded_with_clips_own_words(t, tmp_path):
    theirs = made(t, vocab=49408)
    theirs.save_pretrained(tmp_path/'clip')
    ours, tokenizer = load_clip('hf', str(tmp_path/'clip'))
    assert {k: len(v) for k, v in towers(ours).items()} == {'image': 3, 'text': 2}
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    tokens = tokenizer(['a photo of a cat.', 'a dog'])
    assert tokens.shape == (2, 12) and tokens.max() == 49407
    want = feature(theirs.get_text_features(input_ids=tokens)).detach()
    assert (ours.encode_text(tokens) - want).abs().max() < 1e-5 * want.abs().max()
    adapted = AdaptedCLIP(ours, n_experts=4, rank=2).eval()                            # the layer knows no difference
    assert torch.allclose(adapted.encode_text(tokens, None), ours.encode_text(tokens), atol=1e-5)
    made(t).save_pretrained(tmp_path/'other')
    with pytest.raises(ValueError, match="has 99 tokens, and CLIP's tokenizer 49408"): load_hf(tmp_path/'other')
    with pytest.raises(ValueError, match='is no CLIPModel that transformers loads'): load_hf(tmp_path/'nothing')

def config(**text):
    "What is looked at of a configuration."
    both = dict(hidden_act='quick_gelu', layer_norm_eps=1e-5)
    return SimpleNamespace(
        text_config=SimpleNamespace(**both | dict(vocab_size=99, eos_token_id=98) | text),
        vision_config=SimpleNamespace(**both))

@pytest.mark.parametrize('text, says', [
    (dict(hidden_act='relu'), "hidden_act is 'relu' and 'quick_gelu'"),
    (dict(layer_norm_eps=1e-6), 'layer_norm_eps is 1e-06 and 1e-05: it must be 1e-05'),
    (dict(eos_token_id=7), 'eos_token_id is 7: texts are read at their highest token, 98')])
def test_what_the_towers_do_not_do_is_refused(text, says):
    check_config(config())
    check_config(config(eos_token_id=2))
    with pytest.raises(ValueError, match=says): check_config(config(**text))

def test_a_tensor_without_a_place_is_named():
    assert list(renamed({'logit_scale': torch.ones(())})) == ['logit_scale']
    with pytest.raises(ValueError, match='vision_model.head.weight is in the weights'):
        renamed({'vision_model.head.weight': torch.ones(2)})

def test_the_door_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match='model.pretrained is null'): load_clip('hf')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ValueError, match=r"model=hf needs transformers .*: pip install 'moe_merge_nb\[hf\]'"):
        load_clip('hf', 'somewhere')
    cfg = composed('model=hf', 'model.pretrained=some/where', 'image_size=32')
    assert cfg.model.name == 'hf' and cfg.model.pretrained == 'some/where' and cfg.image_size == 32
