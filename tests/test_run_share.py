import copy, json, pytest, torch
from tempfile import TemporaryDirectory
from pathlib import Path
from safetensors.torch import load_file, save_file
from moe_merge_nb.layer.adapt import AdaptedCLIP, trainable
from moe_merge_nb.clip.backbone import load_clip, pico
from moe_merge_nb.run.describe import *
from moe_merge_nb.run.header import *
from moe_merge_nb.run.share import *
from moe_merge_nb.streams.tasks import Task, prompts, toy_stream

def trained(tasks=2, clip=None, **options):
    "Adapters with random weights everywhere, two of them frozen per block"
    torch.manual_seed(0)
    model = AdaptedCLIP(clip or load_clip()[0], **{**dict(n_experts=4, rank=3), **options}).eval()
    for _ in range(tasks): model.add_task()
    for p in model.moes.parameters(): torch.nn.init.normal_(p, std=0.3)
    for moe in model.moes: moe.freeze([1, moe.block % 4])
    return model

def equal(a, b):
    "Have both models the same tensors under the same names?"
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_shared_blocks_are_part_of_the_description_and_old_files_close_nothing():
    random = lambda: load_clip('pico', 'random')[0]
    net = AdaptedCLIP(random(), n_experts=5, rank=4, shared_blocks=2)
    net.add_task()
    said = experts_config(net)
    again = AdaptedCLIP(random(), **said)
    assert said['shared_blocks'] == 2 and [len(m.experts) for m in again.moes] == [len(m.experts) for m in net.moes]
    opened = all_open(net)
    assert opened.keys() <= net.moes.state_dict().keys()
    assert len(opened) == 7
    assert not any(t.any() for t in opened.values())


def test_everything_comes_back():
    tokenizer = load_clip()[1]
    with TemporaryDirectory() as d:
        for options in (dict(), dict(shared_init=True), dict(gate='top_p', top_p=0.6)):
            model, stream = trained(tasks=3, **options), toy_stream(n_tasks=3)
            shared = load(save(model, Path(d)/'new'/'x.safetensors', tasks=stream, provenance=dict(seed=3)))
            assert equal(model, shared.model)
            images, tokens = torch.randn(4, 3, 32, 32), tokenizer(['a red circle', 'a blue square of some size'])
            for task in (None, 0, 2):
                assert torch.equal(model.encode_image(images, task), shared.model.encode_image(images, task))
                assert torch.equal(model.encode_text(tokens, task), shared.model.encode_text(tokens, task))
            assert [t.name for t in shared.tasks] == stream.names and shared.tasks[1].classes == stream[1].classes
            assert prompts(shared.tasks[2]) == prompts(stream[2]) and shared.provenance == dict(seed=3)
            assert torch.equal(shared.tokenizer(['a red circle']), tokenizer(['a red circle']))


def test_frozen_experts_come_back_closed():
    with TemporaryDirectory() as d: model = load(save(trained(tasks=2), Path(d)/'x.safetensors')).model
    open_now = {id(p) for p in trainable(model)}
    for moe in model.moes:
        frozen = {1, moe.block % 4}
        assert moe.frozen.nonzero().flatten().tolist() == sorted(frozen)
        for e, x in enumerate(moe.experts):
            assert all(p.requires_grad == (e not in frozen) for p in x.parameters())
            if e in frozen: assert not any(id(p) in open_now for p in x.parameters())
        assert [p.requires_grad for r in moe.routers for p in r.parameters()] == [False, False, True, True]
    assert not any(p.requires_grad for p in model.clip.parameters()) and not model.training


def test_loading_is_strict():
    with TemporaryDirectory() as d:
        d = Path(d)
        good = save(trained(tasks=1), d/'good.safetensors')
        # without a checksum, which would find all of this first
        metadata = {KEY: json.dumps({**read_header(good), 'version': 1})}
        def changed(**new):
            tensors = {k: w for k, w in {**load_file(good), **new}.items() if w is not None}
            save_file(tensors, d/'bad.safetensors', metadata)
            return d/'bad.safetensors'
        shape = r'1 of another shape: 0\.routers\.0\.gate \(4, 128\) instead of \(128, 4\)'
        for new, message in (
            ({'2.experts.1.up.bias': None}, r'1 missing: 2\.experts\.1\.up\.bias$'),
            ({'extra': torch.zeros(1)}, '1 left over: extra'),
            ({'0.routers.0.gate': torch.zeros(4, 128)}, shape),
        ):
            with pytest.raises(ValueError, match=message): load(changed(**new))
        with pytest.raises(ValueError, match='another backbone: .*pico.* sha256'):
            load(good, load_clip('toy', 'random'))
        with pytest.raises(FileNotFoundError, match='nowhere'): load(d/'nowhere')
        (d/'text.safetensors').write_text('no tensors here')
        with pytest.raises(ValueError, match='cannot be read as safetensors'): load(d/'text.safetensors')
        save_file(load_file(good), d/'strange.safetensors')
        with pytest.raises(ValueError, match='config.json is missing'): load(d/'strange.safetensors')
        save_file(load_file(good), d/'newer.safetensors', {KEY: json.dumps(dict(version=4))})
        with pytest.raises(ValueError, match='format version 4'): load(d/'newer.safetensors')


def test_a_flipped_bit_is_noticed_and_older_files_stay_readable():
    with TemporaryDirectory() as d:
        good = save(trained(tasks=1), Path(d)/'good.safetensors')
        data, bad = good.read_bytes(), Path(d)/'bad.safetensors'
        # a weight; a digit of the header
        for at, byte in ((len(data) - 3, None), (data.index(b'\\"rank\\": ') + 10, b'5')):
            other = bytearray(data)
            other[at] = byte[0] if byte else other[at] ^ 1
            bad.write_bytes(bytes(other))
            says = 'bad.safetensors: its contents are not what its checksum says'
            with pytest.raises(ValueError, match=says): load(bad)
        save_file(load_file(good), bad, {KEY: json.dumps(read_header(good))}) # a checksum that is gone is no right one
        with pytest.raises(ValueError, match='not what its checksum says'): load(bad)
        save_file(load_file(good), bad, {KEY: json.dumps({**read_header(good), 'version': 1})})
        assert torch.equal(load(bad).model.moes[0].routers[0].gate, load(good).model.moes[0].routers[0].gate)


def test_a_header_is_refused_before_anything_is_built_from_it():
    with TemporaryDirectory() as d:
        good, odd = Path(d)/'good.safetensors', Path(d)/'odd.safetensors'
        save(trained(clip=pico(1), tasks=1), good, with_backbone=True)
        header, tensors = read_header(good), load_file(good)
        def refused(says, **new):
            save_file(tensors, odd, {KEY: json.dumps({**header, 'version': 1, **new})})
            with pytest.raises(ValueError, match=r'odd\.safetensors: .*' + says): load(odd)
        backbone, config = header['backbone'], header['backbone']['config']
        other = lambda **new: dict(backbone={**backbone, 'config': {**config, **new}})
        inside = lambda part, **new: other(**{part: {**config[part], **new}})
        unknown = 'has an entry of unknown use:'
        refused(f"text_cfg {unknown} 'hf_model_name'", **inside('text_cfg', hf_model_name='somebody/model'))
        refused(f"vision_cfg {unknown} 'timm_model_name'", **inside('vision_cfg', timm_model_name='vit'))
        refused(f"experts {unknown} 'size'", experts={**header['experts'], 'size': 3})
        for kind in ('expert', 'router', 'gate', 'mix'):
            strange = {**header['experts'], kind: 'os.system'}
            refused('names parts that are not of this package .os.system.', experts=strange)
        huge = {**header['experts'], 'options': dict(router=dict(hidden=10**12))}
        refused('experts.options has 1000000000000', experts=huge)
        refused('of another shape: text_projection', **other(embed_dim=10**9))
        refused('layers is 1000000000, but', **inside('text_cfg', layers=10**9))
        refused('n_tasks is 1000000000', n_tasks=10**9)
        refused('embed_dim is 1000', **other(embed_dim=10**400))
        refused('scale is nan', experts={**header['experts'], 'scale': float('nan')})
        refused('tasks is 3', tasks=3)
        assert torch.equal(load(good).model.moes[0].routers[0].gate, tensors['0.routers.0.gate'])


def test_nothing_is_saved_that_could_not_be_loaded():
    with TemporaryDirectory() as d:
        path = Path(d)/'x.safetensors'
        with pytest.raises(ValueError, match='the backbone is not pico'): save(trained(clip=pico(1)), path)
        with pytest.raises(ValueError, match='2 names, but there are routers for 1'):
            save(trained(tasks=1), path, tasks=toy_stream(n_tasks=2))
        with pytest.raises(ValueError, match='a function cannot be saved'):
            save(trained(gate=lambda h: h.softmax(-1)), path)
        assert not path.exists()


def test_the_backbone_can_travel_along():
    vision = dict(image_size=16, patch_size=8, width=32, layers=2, head_width=8)
    text = dict(context_length=9, vocab_size=50, width=48, layers=1, heads=3)
    clip = clip_from(dict(embed_dim=24, quick_gelu=True, vision_cfg=vision, text_cfg=text))
    with TemporaryDirectory() as d:
        d, model = Path(d), trained(clip=clip)
        path = save(model, d/'x.safetensors', with_backbone=True)
        shared = load(path)
        images, tokens = torch.randn(3, 3, 16, 16), torch.randint(1, 50, (3, 9))
        for task in (None, 1):
            assert torch.equal(shared.model.encode_image(images, task), model.encode_image(images, task))
            assert torch.equal(shared.model.encode_text(tokens, task), model.encode_text(tokens, task))
        assert shared.tokenizer is None and shared.how['with_backbone']
        again = load(shared.save(d/'again.safetensors'))
        assert torch.equal(again.model.encode_image(images, 0), model.encode_image(images, 0))
        tensors = load_file(path)
        del tensors['clip.logit_scale']
        save_file(tensors, d/'bad.safetensors', {KEY: json.dumps({**read_header(path), 'version': 1})})
        says = 'the backbone in the file does not fit: 1 missing: logit_scale'
        with pytest.raises(ValueError, match=says): load(d/'bad.safetensors')
        named = save(model, d/'named.safetensors', name='ViT-B-16-quickgelu', pretrained='nobody-has-this')
        with pytest.raises(ValueError, match=r'nobody-has-this.* give it as backbone=\(model, tokenizer\)'): load(named)
        assert torch.equal(load(named, (clip, None)).model.encode_image(images, 1), model.encode_image(images, 1))


def test_a_run_directory_is_read():
    from moe_merge_nb.learn.method import Method
    from moe_merge_nb.learn.method import describe
    from moe_merge_nb.learn.state import finished
    from moe_merge_nb.learn.results import Result
    from moe_merge_nb.learn.saved import save_result
    stream, experts = toy_stream(n_tasks=3), dict(n_experts=4, rank=2, top_k=1)
    with TemporaryDirectory() as d:
        d, model = Path(d), trained(tasks=2, **experts) # the run stopped after two of three tasks
        config, adapters = describe(stream, Method('moe', experts=experts), seed=5), dict(model.moes.state_dict())
        save_result(Result(config, adapters=adapters), d)
        shared = load(d)
        assert [t.name for t in shared.tasks] == stream.names[:2] and shared.provenance['seed'] == 5
        assert equal(model, shared.model)
        assert experts.items() <= experts_config(shared.model).items()
        assert not any(p.requires_grad for p in shared.model.moes[2].experts[1].parameters())
        one = load(shared.save(d/'out'/'one.safetensors'))
        assert torch.equal(one.model.moes[0].routers[1].gate, model.moes[0].routers[1].gate)
        config, sums = json.loads((d/'config.json').read_text()), d/'sha256.json'
        digests = json.loads(sums.read_text())
        for name in ('config.json', 'adapters.safetensors'):
            sums.write_text(json.dumps({**digests, name: 64*'0'}))
            with pytest.raises(ValueError, match=f'{name}.* its contents are not those'): load(d)
        sums.unlink() # a run of an earlier version
        for change, message in (
            (None, 'a run without adapters'),
            ({**experts, 'mix': '<function f>'}, 'not of this package'),
            ({**experts, 'gate': '<function f>'}, 'not of this package'),
        ):
            (d/'config.json').write_text(json.dumps({**config, 'experts': change}))
            with pytest.raises(ValueError, match=message): load(d)


def test_a_folder_of_the_hub_round_trips():
    import huggingface_hub
    with TemporaryDirectory() as d:
        model, stream, repo = trained(tasks=2), toy_stream(n_tasks=2), Path(d)/'repo'
        Shared(model, tasks=stream, provenance=dict(seed=1)).save_pretrained(repo)
        back = Shared.from_pretrained(repo)
        assert equal(model, back.model)
        assert back.tasks == [words(t) for t in stream] and back.provenance == dict(seed=1)
        assert {p.name for p in repo.iterdir()} == {'README.md', 'adapters.safetensors', 'config.json'}
        assert json.loads((repo/'config.json').read_text())['moe_merge_nb']['n_tasks'] == 2
        card = huggingface_hub.ModelCard.load(repo/'README.md')
        assert card.data.library_name == 'moe_merge_nb' and 'circle' in card.text
        with pytest.raises(ValueError, match='another backbone'):
            Shared.from_pretrained(repo, backbone=load_clip('toy', 'random'))


def test_push_to_hub_uploads_what_from_pretrained_reads():
    import shutil
    from unittest.mock import patch as replaced
    from huggingface_hub import HfApi
    with TemporaryDirectory() as d:
        model, hub = trained(tasks=1), Path(d)/'hub'
        class Repo: repo_id = 'user/name'
        create = replaced.object(HfApi, 'create_repo', lambda self, **kw: Repo)
        def copied(self, folder_path, **kw): return shutil.copytree(folder_path, hub)
        upload = replaced.object(HfApi, 'upload_folder', copied)
        with create, upload: Shared(model).push_to_hub('user/name')
        ours = replaced('huggingface_hub.hf_hub_download', lambda repo, file, **kw: str(hub/file))
        def fetched(repo_id, filename, **kw): return str(hub/filename)
        theirs = replaced('huggingface_hub.hub_mixin.hf_hub_download', fetched)
        with ours, theirs: back = Shared.from_pretrained('user/name')
        assert equal(model, back.model)
