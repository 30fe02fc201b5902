import copy, pytest, torch
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from safetensors.torch import save_file
from torch import nn
from moe_merge_nb.run.released import *
from moe_merge_nb.run.theirs import sizes
from moe_merge_nb.run.share import load
class Adapter(nn.Module):
    def __init__(self, d, r):
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(d, r), nn.Linear(r, d)

class Block(nn.Module):
    "One residual block with these names; `task` None: without experts"
    def __init__(self, d, heads, E, r, T, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attn = nn.MultiheadAttention(d, heads)
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(d, 4*d), gelu=nn.Identity(), c_proj=nn.Linear(4*d, d)))
        self.register_buffer('mean', torch.zeros(1))
        self.register_buffer('std', torch.ones(1))
        self.adaptmlp_list = nn.ModuleList(Adapter(d, r) for _ in range(E))
        self.adaptmlp = self.adaptmlp_list[-1]
        self.router_list = nn.ParameterList(torch.zeros(d, E) for _ in range(T))
        self.w_noise_list = nn.ParameterList(torch.zeros(d, E) for _ in range(T))

    def attention(self, x): # (n, tokens, d)
        n, L, d = x.shape
        qkv = (x @ self.attn.in_proj_weight.T + self.attn.in_proj_bias).view(n, L, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (d // self.heads)**0.5 # (n, heads, tokens, tokens)
        if self.causal: scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
        return self.attn.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, L, d))

    def forward(self, x, task):
        x = x + self.attention(self.ln_1(x))
        z = self.mlp.c_fc(self.ln_2(x))
        mixed = 0 if task is None else self.experts(x, task)
        return x + self.mlp.c_proj(z * torch.sigmoid(1.702 * z)) + mixed

    def experts(self, x, task):
        y = torch.zeros_like(x)
        for i, h in enumerate(x[:, 0] @ self.router_list[task]): # token 0 of each sequence decides
            best = h.topk(2)
            for g, e in zip(best.values.softmax(0), best.indices):
                expert = self.adaptmlp_list[e]
                y[i] += g * 0.1 * expert.up_proj(expert.down_proj(x[i]).relu())
        return y
def empty(*shape): return nn.Parameter(torch.zeros(shape))

class Tower(nn.Module):
    def __init__(self, n, *args):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*args) for _ in range(n))

    def forward(self, x, task):
        for b in self.resblocks: x = b(x, task)
        return x

class Visual(nn.Module):
    def __init__(self, size, patch, d, layers, heads, out, E, r, T):
        super().__init__()
        self.conv1 = nn.Conv2d(3, d, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(d), nn.LayerNorm(d)
        self.class_embedding = empty(d)
        self.positional_embedding = empty((size // patch)**2 + 1, d)
        self.proj = empty(d, out)
        self.transformer = Tower(layers, d, heads, E, r, T, False)

    def forward(self, images, task):
        x = self.conv1(images).flatten(2).mT # (n, patches, d)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x), task)[:, 0]) @ self.proj
def deviation(name, p):
    "Of random weights that make every part matter"
    if p.ndim < 2 or 'embedding' in name or 'router' in name: return 1
    return (4 if 'adaptmlp' in name else 1) * p.shape[-1]**-0.5

class Theirs(nn.Module):
    "A CLIP with these names"
    def __init__(self,
        size=32, patch=8, d=64, layers=2, heads=1, # images
        context=20, vocabulary=4514, d_text=128, layers_text=3, heads_text=2, # texts
        out=24, E=5, r=4, T=3, seed=0,
    ):
        super().__init__()
        self.visual = Visual(size, patch, d, layers, heads, out, E, r, T)
        self.transformer = Tower(layers_text, d_text, heads_text, E, r, T, True)
        self.token_embedding, self.ln_final = nn.Embedding(vocabulary, d_text), nn.LayerNorm(d_text)
        self.positional_embedding = empty(context, d_text)
        self.text_projection = empty(d_text, out)
        self.logit_scale = empty()
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if 'ln_' not in name: p.data = torch.randn(p.shape, generator=g) * deviation(name, p)
        self.requires_grad_(False).eval()

    def encode_image(self, images, task=None): return self.visual(images, task)

    def encode_text(self, tokens, task=None):
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        x = self.ln_final(self.transformer(x, task))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def test_sizes_are_read_from_the_tensors():
    images = dict(size=24, patch=6, d=96, heads=3, layers=4)
    texts = dict(context=9, vocabulary=60, d_text=64, layers_text=1)
    state = Theirs(**images, **texts, out=40, E=7, r=3, T=12).state_dict()
    clip, experts = sizes(state, vision_heads=3)
    assert experts == dict(n_experts=7, rank=3, n_tasks=12) and clip['embed_dim'] == 40
    assert clip['vision_cfg'] == dict(image_size=24, patch_size=6, width=96, layers=4, head_width=32, mlp_ratio=4)
    assert clip['text_cfg'] == dict(context_length=9, vocab_size=60, width=64, layers=1, heads=1, mlp_ratio=4)


def test_both_towers_compute_what_the_reference_computes():
    def agree(i, sizes_of, heads):
        reference = Theirs(**sizes_of, seed=i).double()
        model = from_moe_adapters4cl(reference.state_dict(), **heads).double()
        size, g = sizes_of.get('size', 32), torch.Generator().manual_seed(i)
        images = torch.randn(5, 3, size, size, generator=g).double()
        tokens = torch.randint(1, 4513, (6, 20), generator=g)
        tokens[torch.arange(6), torch.tensor([4, 19, 9, 1, 12, 7])] = 4513
        outputs = []
        for task in (None, *range(model.n_tasks)):
            for a, b in (
                (reference.encode_image(images, task), model.encode_image(images, task)),
                (reference.encode_text(tokens, task), model.encode_text(tokens, task)),
            ):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
                others = [o for o in outputs if o.shape == a.shape]
                assert a.std() > 0.1 and all((o - a).abs().max() > 1e-4 for o in others) # every task computes another
                outputs.append(a)
        several = model.encode_image(images, torch.tensor([0, -1, 1, 2, 0]))
        for i, task in enumerate((0, None, 1, 2, 0)):
            torch.testing.assert_close(several[i:i+1], reference.encode_image(images[i:i+1], task))
    images = dict(size=24, patch=6, d=96, heads=3, layers=4)
    texts = dict(d_text=48, heads_text=4, layers_text=2)
    agree(0, {}, {})
    agree(1, dict(**images, **texts, E=7, r=3, T=4), dict(vision_heads=3, text_heads=4))


def test_heads_and_constants_matter():
    reference, images = Theirs(d_text=64, heads_text=2), torch.randn(3, 3, 32, 32)
    state = reference.state_dict()
    with pytest.raises(ValueError, match='vision_heads is 5, the width 64'): from_moe_adapters4cl(state, vision_heads=5)
    with pytest.raises(ValueError, match='text_heads is None, the width 48'):
        from_moe_adapters4cl(Theirs(d_text=48).state_dict())
    for changed in (dict(vision_heads=2), dict(top_k=1), dict(scale=0.2)):
        other = from_moe_adapters4cl(state, **changed)
        assert (other.encode_image(images, 0) - reference.encode_image(images, 0)).abs().max() > 1e-3
    model, tokens = from_moe_adapters4cl(state, text_heads=2), torch.randint(1, 4000, (3, 20))
    wanted = reference.encode_text(tokens, 1)
    torch.testing.assert_close(model.encode_text(tokens, 1), wanted, rtol=1e-4, atol=1e-4)


def test_every_wrapping_gives_the_same_model():
    state, images = Theirs().state_dict(), torch.randn(2, 3, 32, 32)
    def features(state): return from_moe_adapters4cl(state).encode_image(images, 1)
    extras = dict(
        input_resolution=torch.tensor(32),
        context_length=torch.tensor(20),
        vocab_size=torch.tensor(4514),
        attn_mask=torch.full((20, 20), -torch.inf).triu(1))
    for other in (
        {'state_dict': state},
        {'state_dict': {f'module.{k}': w for k, w in state.items()}},
        {**state, **extras},
        {k: w for k, w in state.items() if 'ln_3' not in k and '.adaptmlp.' not in k},
    ):
        assert torch.equal(features(other), features(state))
    half = {k: w.half() for k, w in state.items()}
    assert {w.dtype for w in from_moe_adapters4cl(half).clip.state_dict().values()} == {torch.float32}
    assert torch.equal(features(half), features({k: w.float() for k, w in half.items()}))


def test_every_tensor_is_accounted_for():
    state, block = Theirs().state_dict(), 'transformer.resblocks.2.'
    uses = from_moe_adapters4cl(state).uses
    assert uses.keys() == state.keys()
    assert list(uses.values()).count('experts') == 5 * 5 * 4 and list(uses.values()).count('routers') == 5 * 3
    def without(name): return {k: w for k, w in state.items() if k != name}
    def having(name, *shape): return {**state, name: torch.ones(shape) if 'bias' in name else torch.zeros(shape)}
    second = 'adaptmlp.up_proj.bias should be a second name of .*adaptmlp_list.4.up_proj.bias, but they differ'
    shape = r'1 of another shape: 4\.routers\.1\.gate \(5, 128\) instead of \(128, 5\)'
    sixth = block + 'adaptmlp_list.5.down_proj.weight'
    for bad, message in (
        (having(sixth, 4, 128), f'unknown use: {sixth}'),
        (having('visual.new', 1), '1 tensors of unknown use: visual.new'),
        (having('attn_mask', 20, 20), 'unknown use: attn_mask'),
        (having(block + 'adaptmlp.up_proj.bias', 128), second),
        (without('ln_final.bias'), '1 tensors are missing: ln_final.bias'),
        (without(block + 'w_noise_list.1'), '1 tensors are missing: .*w_noise_list.1'),
        (having(block + 'router_list.1', 5, 128), shape),
    ):
        with pytest.raises(ValueError, match=message): from_moe_adapters4cl(bad)


def test_what_is_no_such_checkpoint_is_refused():
    state = Theirs().state_dict()
    plain = {k: w for k, w in state.items() if 'adaptmlp' not in k and 'router' not in k and 'noise' not in k}
    image_only = {k: w for k, w in state.items() if k in plain or k.startswith('visual.')}
    def renamed(k): return k.replace('router_list.0', 'router1').replace('w_noise_list.0', 'w_noise')
    one_router = {renamed(k): w for k, w in state.items() if 'list.1' not in k}
    expert = 'transformer.resblocks.0.adaptmlp_list.0.down_proj.weight is missing'
    for bad, message in (
        (plain, f'visual.{expert}'),
        (image_only, expert),
        (one_router, 'router_list.0 is missing'),
        ({'epoch': 3}, "'epoch' is a int, not a tensor"),
        ({}, 'not a state dict'),
        ([1], 'a list'),
        ({'state_dict': 5}, 'not a state dict'),
        ({'weight': torch.zeros(2)}, 'visual.conv1.weight is missing'),
    ):
        with pytest.raises(ValueError, match=message): from_moe_adapters4cl(bad)


def test_zero_routers_are_kept():
    reference = Theirs(T=4)
    for tower in (reference.visual.transformer, reference.transformer):
        for b in tower.resblocks: b.router_list[3].data.zero_()
    model = from_moe_adapters4cl(reference.state_dict())
    assert model.n_tasks == 4
    assert all((m.routers[3].gate == 0).all() and (m.routers[2].gate != 0).any() for m in model.moes)
    gates = []
    model.encode_image(torch.randn(2, 3, 32, 32), 3, probe=lambda routing: gates.append(routing.gates))
    assert all(torch.equal(g, torch.tensor([[.5, .5, 0, 0, 0]]*2)) for g in gates)


def test_frozen_names_close_their_experts():
    state, image, text = Theirs().state_dict(), 'visual.transformer.resblocks.1.', 'transformer.resblocks.0.'
    lines = [
        f'{image}adaptmlp_list.3.down_proj.weight\n',
        f'{image}adaptmlp_list.3.up_proj.bias\n',
        f'{text}adaptmlp_list.0.down_proj.bias\n',
        '\n']
    model = from_moe_adapters4cl(state, frozen=lines)
    frozen = {(m.tower, m.block): m.frozen.nonzero().flatten().tolist() for m in model.moes if m.frozen.any()}
    assert frozen == {('image', 1): [3], ('text', 0): [0]}
    experts = model.moes[1].experts
    assert not any(p.requires_grad for p in experts[3].parameters())
    assert all(p.requires_grad for p in experts[2].parameters())
    for bad in (f'{text}router_list.0', 'transformer.resblocks.7.adaptmlp_list.0.down_proj.bias'):
        with pytest.raises(ValueError, match=f'frozen names {bad!r}'): from_moe_adapters4cl(state, frozen=[bad])


def test_a_converted_checkpoint_can_be_merged():
    from moe_merge_nb.merge.rule import merge_once
    reference, images = Theirs(), torch.randn(4, 3, 32, 32)
    model = from_moe_adapters4cl(reference.state_dict())
    before = model.encode_image(images, 0), model.encode_image(images)
    for moe in model.moes: assert merge_once(moe, torch.tensor([5, 9, 1, 4, 3]))['target'] == 2
    assert not torch.equal(model.encode_image(images, 0), before[0])
    assert torch.equal(model.encode_image(images), before[1])
    # the same merge in their model
    for b in (*reference.visual.transformer.resblocks, *reference.transformer.resblocks):
        first, second, target = (e.parameters() for e in b.adaptmlp_list[:3])
        for p, q, z in zip(first, second, target): z.data = (p + q) / 2
    wanted = reference.encode_image(images, 0)
    torch.testing.assert_close(model.encode_image(images, 0), wanted, rtol=1e-4, atol=1e-4)


def test_the_command_converts_and_says_what_it_did():
    import contextlib, io
    def call(*args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(a) for a in args])
        return code, out.getvalue(), err.getvalue()
    reference, images, tokens = Theirs(), torch.randn(3, 3, 32, 32), torch.randint(1, 4514, (3, 20))
    state = reference.state_dict()
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with TemporaryDirectory() as d:
        d = Path(d)
        torch.save({'state_dict': state}, d/'a.pth')
        save_file({k: w.clone() for k, w in state.items()}, d/'a.safetensors')
        (d/'frozen').write_text('transformer.resblocks.0.adaptmlp_list.1.down_proj.bias\n')
        for file in ('a.pth', 'a.safetensors'):
            made = d/'out'/f'{file}.safetensors'
            code, out, err = call(d/file, made, '--frozen', d/'frozen')
            assert code == 0 and not err
            assert '5 experts of rank 4 in 5 blocks, routers for 3 tasks' in out and 'second name' in out
            shared = load(made)
            for task in (None, 0, 2):
                close(shared.model.encode_image(images, task), reference.encode_image(images, task))
                close(shared.model.encode_text(tokens, task), reference.encode_text(tokens, task))
            assert shared.provenance['file'] == file and shared.tokenizer(['a red circle']).shape == (1, 20)
            assert shared.model.moes[2].frozen[1]
        assert call(d/'a.pth', d/'out'/'a.pth.safetensors')[0] == 2
        assert call(d/'a.pth', d/'out'/'a.pth.safetensors', '--force')[0] == 0


def test_the_command_refuses_in_one_line():
    import contextlib, io
    with TemporaryDirectory() as d:
        d = Path(d)
        for suffix in ('pth', 'safetensors'): (d/f'text.{suffix}').write_text('hello')
        torch.save(torch.nn.Linear(2, 2), d/'pickled.pth')
        torch.save({'weight': torch.zeros(3)}, d/'other.pth')
        for file, message in {
            'nothing.pth': 'is not there',
            'text.pth': 'not a file of tensors',
            'text.safetensors': 'that safetensors reads',
            'pickled.pth': 'weights_only=True',
            'other.pth': 'no checkpoint of MoE-Adapters4CL',
        }.items():
            with contextlib.redirect_stderr(io.StringIO()) as err: code = main([str(d/file), str(d/'x.safetensors')])
            said = err.getvalue()
            assert code == 2 and message in said and said.count('\n') == 1, said
        assert not (d/'x.safetensors').exists()
