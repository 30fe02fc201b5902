"""Weights of other programs: out of any wrapping, and never larger in memory than on the disk."""
import io
import zipfile
import pytest
import torch
from open_clip import create_model
from safetensors.torch import save_file
from moe_merge_nb.clip.backbone import load_clip, pico
from moe_merge_nb.run.released import convert, main, read_checkpoint

WRAPPED = {
    'plain': lambda s: s,
    'model': lambda s: {'model': s, 'optimizer': {'lr': 1.}, 'epoch': 3},
    'model_state_dict': lambda s: {'epoch': 3, 'model_state_dict': s},
    'state_dict': lambda s: {'state_dict': s},
    'twice': lambda s: {'model': {'state_dict': s}},
    'module': lambda s: {'model': {f'module.{k}': w for k, w in s.items()}},
    'compiled': lambda s: {f'module._orig_mod.{k}': w for k, w in s.items()},
    'lightning': lambda s: {'state_dict': {f'model.{k}': w.half() for k, w in s.items()}},
}

@pytest.mark.parametrize('wrap', WRAPPED)
def test_a_backbone_is_read_out_of_any_wrapping(tmp_path, wrap):
    state = {k: w.half().float() for k, w in pico(seed=5).state_dict().items()}
    torch.save(WRAPPED[wrap](state), tmp_path/'w.pt')
    found = load_clip('pico', str(tmp_path/'w.pt'))[0].state_dict()
    assert all(torch.equal(found[k], w) for k, w in state.items())

@pytest.fixture(scope='module')
def other():
    "The smallest model of open_clip with two transformers, with other weights than it begins with."
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return create_model('ViT-S-32-alt').state_dict()

def test_so_is_any_model_of_open_clip(tmp_path, other):
    torch.save({'model': {f'module.{k}': w for k, w in other.items()}}, tmp_path/'w.pth')
    found = load_clip('ViT-S-32-alt', str(tmp_path/'w.pth'))[0].state_dict()
    assert all(torch.equal(found[k], w) for k, w in other.items())

def test_a_file_of_another_model_is_refused_by_name(tmp_path, other):
    save_file(other, tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='other.safetensors does not hold the weights of this model'):
        load_clip('pico', str(tmp_path/'other.safetensors'))
    torch.save({'model': 3}, tmp_path/'three.pt')
    for name in ('pico', 'ViT-S-32-alt'):
        with pytest.raises(ValueError, match="three.pt does not hold .*not a state dict: 'model' is a int"):
            load_clip(name, str(tmp_path/'three.pt'))

# ---- what unfolds

def expanded(n): return torch.ones(1).half().expand(n)

@pytest.mark.parametrize('content', [
    {'w': expanded(10**12)},
    {'model': {'w': expanded(10**12)}},
    {'state_dict': [{'w': expanded(10**12)}]},
    {f'{i}': w for i, w in enumerate([torch.zeros(20_000)] * 50)},             # stored once, used fifty times
])
def test_a_file_that_unfolds_is_refused_before_it_does(tmp_path, content):
    torch.save(content, tmp_path/'bomb.pth')
    with pytest.raises(ValueError, match='bomb.pth is not a file of tensors.*unfold to .*neither expanded nor'):
        read_checkpoint(tmp_path/'bomb.pth')
    with pytest.raises(ValueError, match='bomb.pth'): load_clip('pico', str(tmp_path/'bomb.pth'))
    with pytest.raises(ValueError, match='bomb.pth'): convert(tmp_path/'bomb.pth', tmp_path/'out.safetensors')
    assert main([str(tmp_path/'bomb.pth'), str(tmp_path/'out.safetensors')]) == 2

def test_so_is_a_compressed_one(tmp_path):
    data = io.BytesIO()
    torch.save({'w': torch.zeros(1_000_000)}, data)
    with zipfile.ZipFile(data) as a, zipfile.ZipFile(tmp_path/'z.pt', 'w', zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist(): b.writestr(name, a.read(name))
    with pytest.raises(ValueError, match='z.pt .*unfold to 4,0'): read_checkpoint(tmp_path/'z.pt')

def test_tied_weights_are_read(tmp_path):
    w = torch.randn(1000)
    torch.save({'a': w, 'b': w, 'half': w[::2]}, tmp_path/'tied.pt')
    assert set(read_checkpoint(tmp_path/'tied.pt')) == {'a', 'b', 'half'}
