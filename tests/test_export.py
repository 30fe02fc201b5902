"""One task's image encoder as a file says what the model says, to 1e-5, in batches of any size."""
import json
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from moe_merge_nb.layer.router import top_k_gates
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.run.encoder import ImageEncoder, disagreement
from moe_merge_nb.run.export import export, main, own_parts
from moe_merge_nb.run.share import Shared, save
from moe_merge_nb.streams.tasks import toy_stream
from toys import toy_model

STREAM = toy_stream(n_tasks=2)


def shared(**kinds):
    "A toy model of two tasks in company of its words."
    model, tokenizer = toy_model(**kinds)
    return Shared(model, tokenizer, STREAM)


class Cubed(nn.Module):
    "An expert of somebody's own."
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x): return self.up(x)**3 / 100


def looks(x, route, experts):
    "A mixture that decides by its data what to compute."
    gates = route(x)
    return experts[0](x) if gates[0, 0] > 0 else experts[1](x) + experts[2](x)


KINDS = {
    'the default': (dict(), {'gathered'}),
    'more selected': (dict(top_k=3), {'gathered'}),
    'one expert': (dict(n_experts=1, top_k=1), {'fused'}),
    'one expert of another kind': (dict(n_experts=1, top_k=1, expert='norm'), {'fused'}),
    'gelu': (dict(expert='gelu'), {'weighted'}),
    'norm, a mass': (dict(expert='norm', gate='top_p'), {'weighted'}),
    'another router': (dict(router='mlp', shared_blocks=2), {'fused', 'gathered'}),
    'an own expert': (dict(expert=Cubed), {'weighted'})}

@pytest.mark.parametrize('name', KINDS)
def test_the_plain_encoder_says_what_the_model_says(name):
    kinds, ways = KINDS[name]
    model, _ = toy_model(**kinds)
    for task in (0, 1):
        encoder = ImageEncoder(model, task)
        assert set(encoder.ways) == ways and len(encoder.ways) == 4
        assert disagreement(encoder, model, task) < 2e-6
        assert disagreement(encoder, model, 1 - task) > .01 or len(model.moes[-1].experts) == 1


@pytest.mark.parametrize('kinds', [dict(), dict(gate='top_p', top_p=.3), dict(expert='gelu'), dict(expert='norm')])
def test_experts_that_nothing_chooses_between_are_fused(kinds):
    model, _ = toy_model(n_tasks=1, **kinds)
    for moe in model.moes: nn.init.zeros_(moe.routers[0].gate)
    model.moes[1].routers[0].closed[1:] = True
    encoder = ImageEncoder(model, 0)
    last = 'weighted' if kinds.get('expert') == 'norm' else 'fused' # what normalises over neurons stays apart
    assert encoder.ways == [last, 'fused', last, last]
    assert encoder.mixtures[1] is model.moes[1].experts[0] # the gate is one: the expert itself
    assert disagreement(encoder, model, 0) < 2e-6


def test_rows_with_fewer_open_experts_than_are_selected():
    model, _ = toy_model(n_tasks=1, top_k=3)
    for moe in model.moes: moe.routers[0].closed[:2] = True # two of four are left
    assert set(ImageEncoder(model, 0).ways) == {'gathered'}
    assert disagreement(ImageEncoder(model, 0), model, 0) < 2e-6


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "The files of the second task, in TorchScript, and the model."
    out, it = tmp_path_factory.mktemp('export')/'b.pt', shared()
    return out, it, export(it, STREAM.names[1], out, 'torchscript')


def test_torchscript_agrees_in_every_batch_size(written):
    out, it, said = written
    exported = torch.jit.load(str(out))
    for n in (1, 2, 7):
        images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        wanted = F.normalize(it.model.encode_image(images, 1), dim=-1)
        assert exported(images).shape == wanted.shape
        torch.testing.assert_close(exported(images), wanted, atol=1e-5, rtol=0)
    assert said['off_by'] <= 1e-5 and said['format'] == 'torchscript'
    assert {k.split('.')[0] for k in exported.state_dict()} == {'visual', 'mixtures'} # no text tower, nothing else


def test_logits_by_the_files_alone_are_the_models(written):
    out, it, _ = written
    beside, said = np.load(out.with_suffix('.npz')), json.loads(out.with_suffix('.json').read_text())
    assert beside['classes'].tolist() == said['classes'] == list(STREAM[1].classes)
    assert said['images']['size'] == [32, 32] and said['task'] == STREAM.names[1]
    images = torch.stack([STREAM[1].test[i][0] for i in range(6)])
    text = class_embeddings(it.model, it.tokenizer, STREAM[1], 1)
    z = F.normalize(it.model.encode_image(images, 1), dim=-1)
    wanted = it.model.logit_scale.exp() * z @ text.T
    features = torch.jit.load(str(out))(images).numpy()
    np.testing.assert_allclose(beside['scale'] * features @ beside['text'].T, wanted.detach(), atol=1e-3)


def test_a_mixture_that_looks_at_its_data_is_refused_by_name_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match='looks.*cannot be exported'):
        export(shared(mix=looks), 0, tmp_path/'x.pt', 'torchscript')
    assert not list(tmp_path.iterdir())


def test_what_does_not_agree_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr('moe_merge_nb.run.export.program', lambda *encoder: None) # what refuses earlier
    monkeypatch.setattr('moe_merge_nb.run.export.TOLERANCE', -1.)
    with pytest.raises(ValueError, match='off by .* not written'):
        export(shared(n_experts=1, top_k=1), 0, tmp_path/'x.pt', 'torchscript')
    assert not list(tmp_path.iterdir())


def test_parts_of_ones_own_are_known_by_name():
    assert own_parts(toy_model()[0]) == ''
    assert 'experts.expert=' in own_parts(toy_model(expert=Cubed)[0])
    assert 'experts.gate=' in own_parts(toy_model(gate=lambda logits: top_k_gates(logits, 1))[0])


def test_a_model_in_training_and_a_task_without_routers_are_refused():
    model, _ = toy_model()
    with pytest.raises(ValueError, match='choose 0 ... 1'): ImageEncoder(model, 2)
    with pytest.raises(ValueError, match='call eval'): ImageEncoder(model.train(), 0)


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    it = shared(n_experts=1, top_k=1)
    run = str(save(it.model, tmp_path/'run'/'x.safetensors', tasks=STREAM, with_backbone=True))
    monkeypatch.chdir(tmp_path)
    assert main([run, '--task', STREAM.names[0], '--format', 'torchscript']) == 0
    assert '4 fused' in capsys.readouterr().out
    files = {p.suffix for p in tmp_path.iterdir() if p.is_file()}
    assert files == {'.pt', '.npz', '.json'}
    assert main([run, '--task', 'nobody', '--format', 'torchscript']) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ("'nobody'", *STREAM.names))
    assert main(['no/such/run', '--task', '0']) == 2


def test_without_the_packages_there_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr('moe_merge_nb.run.export.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r'onnxruntime.*pip install "moe_merge_nb\[export\]"'):
        export(shared(n_experts=1, top_k=1), 0, tmp_path/'x.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kinds', [dict(shared_blocks=2), dict(expert='norm', gate='top_p')])
def test_onnx_agrees_in_every_batch_size(tmp_path, kinds):
    for name in ('onnx', 'onnxscript'): pytest.importorskip(name)
    runtime = pytest.importorskip('onnxruntime') # a development check: pip install -e '.[export]'
    it, out = shared(**kinds), tmp_path/'a.onnx'
    export(it, 0, out)
    session = runtime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    assert [x.name for x in session.get_inputs()] == ['images']
    assert [x.name for x in session.get_outputs()] == ['features']
    for n in (1, 2, 7):
        images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        features, = session.run(None, {'images': images.numpy()})
        wanted = F.normalize(it.model.encode_image(images, 0), dim=-1).detach().numpy()
        np.testing.assert_allclose(features, wanted, atol=1e-5, rtol=0)
    assert {p.name for p in tmp_path.iterdir()} == {'a.onnx', 'a.npz', 'a.json'} # one file has all weights
