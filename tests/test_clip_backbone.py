import pytest, torch
from moe_merge_nb.clip.backbone import MODELS, load_clip, pico, pico_tokenizer, read_weights, towers, write_weights


def test_weights_survive_the_disk_in_half_precision():
    import tempfile
    a, b = pico(0), pico(1)
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/a.safetensors'
        write_weights(a, path)
        read_weights(b, path)
        with pytest.raises(ValueError, match='a.safetensors'): read_weights(torch.nn.Linear(2, 2), path)
    for (name, w), v in zip(a.state_dict().items(), b.state_dict().values()):
        assert v.dtype == torch.float32 and torch.equal(w.half().float(), v), name


def test_only_transformer_towers_are_accepted():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    assert {name: len(blocks) for name, blocks in towers(pico()).items()} == {'image': 4, 'text': 3}
    text = dict(context_length=8, vocab_size=9, width=32, heads=1, layers=1)
    resnet = CLIP(32, CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32), CLIPTextCfg(**text))
    with pytest.raises(ValueError, match='ModifiedResNet'): towers(resnet)
    with pytest.raises(ValueError, match='Linear'): towers(torch.nn.Linear(2, 2))
    vit = CLIPVisionCfg(layers=1, width=32, head_width=32, patch_size=16, image_size=32)
    other = CLIP(32, vit, CLIPTextCfg(**text, qk_norm=True))
    with pytest.raises(ValueError, match='text tower is made of CustomResidualAttentionBlock'): towers(other)


def test_the_loaded_clip_is_frozen():
    model, tokenizer = load_clip('pico', 'random', seed=3)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.visual.proj, pico(3).visual.proj)
    shipped = load_clip()[0]
    assert not torch.equal(shipped.visual.proj, pico().visual.proj)
    assert not any(p.requires_grad for p in shipped.parameters())


def test_wrong_names_and_a_failed_download_say_what_to_do():
    import urllib.error
    from unittest.mock import patch
    def openai(): load_clip('ViT-B-16-quickgelu', 'openai')
    with pytest.raises(ValueError, match="neither 'pico' nor"): load_clip('pikachu')
    with pytest.raises(ValueError, match="neither a file nor a tag.*openai"):
        load_clip('ViT-B-16-quickgelu', 'no-such-tag')
    with pytest.raises(ValueError, match="neither a file nor a tag"): load_clip('ViT-B-16-quickgelu')
    offline = urllib.error.URLError('no network')
    with patch('moe_merge_nb.clip.backbone.download_pretrained', side_effect=offline):
        with pytest.raises(ConnectionError, match='(?s)Offline.*pass its path'): openai()


def test_toy_is_pico_with_one_narrow_block_a_tower():
    (model, tokenizer), whole = load_clip('toy', 'random', seed=3), pico()
    assert {name: len(blocks) for name, blocks in towers(model).items()} == {'image': 1, 'text': 1}
    assert model.visual.proj.shape == model.text_projection.shape == (32, 32)
    assert model.visual.image_size == whole.visual.image_size and model.context_length == whole.context_length
    assert tokenizer.vocab_size == model.token_embedding.num_embeddings
    again = load_clip(MODELS['toy']['name'], MODELS['toy']['pretrained'], seed=3)[0]
    assert torch.equal(model.visual.proj, again.visual.proj)
    with pytest.raises(ValueError, match="toy has no weights of its own: pretrained='random'"): load_clip('toy')
