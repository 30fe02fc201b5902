"""The adapted block against the formulas of the method (arXiv 2403.11549), written here a second time, plainly, at the
shapes of ViT-B/16.

    x <- x + attn(ln_1(x))
    x <- x + mlp(ln_2(x)) + y
    y = sum_e g_e E_e(x)
    E_e(x) = s (W_up dropout(relu(W_down x + b_down)) + b_up)
    g = softmax over the k largest of h, 0 elsewhere
    h = x_0 W_gate (+ eps (softplus(x_0 W_noise) + 0.01) in training), x_0: token 0

Nothing here uses the package's experts, routers or mixtures, nor nn.MultiheadAttention: attention is a softmax over
scores, the experts run one sequence at a time. Outputs are compared by the largest absolute difference (outputs have a
standard deviation of order 1), gradients by the largest difference over the largest entry of each tensor. The
comparison is in double precision, where a wrong formula shows and rounding does not, and once more in single
precision, whose differences are printed (pytest -rP)."""
import copy
from dataclasses import dataclass
from functools import partial
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from torch.nn import functional as F
from moe_merge_nb.clip import encode
from moe_merge_nb.layer.adapt import AdaptedCLIP, n_adapter_parameters, widths
from moe_merge_nb.layer.moe import MoE, mixture


E, R, K, S, P = 22, 64, 2, 0.1, 0.1  # experts, rank, top-k, scale, dropout
TOWERS = ['image', 'text']
TASK = 1  # of two


# ---- the formulas

def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

def attention(
    x, # (n, tokens, d)
    w, # weights of a block, by name
    heads,
    causal,
):
    n, tokens, d = x.shape
    out = torch.zeros_like(x)
    q, k, v = (x @ w['attn.in_proj_weight'].T + w['attn.in_proj_bias']).chunk(3, -1)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / (d // heads)**0.5
        if causal: scores = scores + torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        out[..., part] = p / p.sum(-1, keepdim=True) @ v[..., part]
    return out @ w['attn.out_proj.weight'].T + w['attn.out_proj.bias']

def mlp(x, w):
    z = x @ w['mlp.c_fc.weight'].T + w['mlp.c_fc.bias']
    return z / (1 + (-1.702 * z).exp()) @ w['mlp.c_proj.weight'].T + w['mlp.c_proj.bias']

def experts(
    x, # (n, tokens, d)
    a, # adapters, by name
    draws, # (eps, keep) of training, or None
): # the mixture y of a batch of sequences, and which experts each one chose
    y, chosen = [], []
    for i, sequence in enumerate(x):
        x0 = sequence[0]
        h = x0 @ a[f'routers.{TASK}.gate']
        if draws: h = h + draws[0][i] * ((1 + (x0 @ a[f'routers.{TASK}.noise']).exp()).log() + 0.01)
        best = sorted(range(E), key=lambda e: -h[e].item())[:K]
        weights = h[best].exp() / h[best].exp().sum()
        total = torch.zeros_like(sequence)
        for rank, e in enumerate(best):
            hidden = (sequence @ a[f'experts.{e}.down.weight'].T + a[f'experts.{e}.down.bias']).clamp(min=0)
            if draws: hidden = hidden * draws[1][i, :, rank*R:(rank + 1)*R] / (1 - P)
            said = hidden @ a[f'experts.{e}.up.weight'].T + a[f'experts.{e}.up.bias']
            total = total + weights[rank] * S * said
        y.append(total)
        chosen.append(best)
    return torch.stack(y), chosen

def block(
    x, # (n, tokens, d)
    w, # weights of the block, by name
    a, # adapters, by name; None: they are off
    heads,
    causal,
    draws=None, # (eps, keep) of training
): # what one residual block makes of x, and which experts each sequence chose
    x = x + attention(layer_norm(x, w['ln_1.weight'], w['ln_1.bias']), w, heads, causal)
    y, chosen = experts(x, a, draws) if a else (0, None)
    return x + mlp(layer_norm(x, w['ln_2.weight'], w['ln_2.bias']), w) + y, chosen


# ---- the model under test

def spread(name, p):
    "The standard deviation that a trained adapter of this name and shape has, roughly."
    if p.ndim == 1: return 0.3
    return 2 * p.shape[0]**-0.5 if 'routers' in name else 1.5 * p.shape[1]**-0.5

def towers(vocabulary=49408):
    "ViT-B/16 with two of its twelve blocks per tower, and random weights."
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=224, patch_size=16, width=768, layers=2, head_width=64)
    text = CLIPTextCfg(vocab_size=vocabulary, width=512, heads=8, layers=2)
    return CLIP(512, vision, text, quick_gelu=True).eval().requires_grad_(False)

def random_model():
    "Widths, heads, tokens, experts and ranks of ViT-B/16, two blocks per tower, weights of the size trained ones have."
    clip = towers(1000).train()
    model = AdaptedCLIP(clip, n_experts=E, rank=R, top_k=K, scale=S, dropout=P)
    for _ in range(2): model.add_task()
    for name, p in model.clip.named_parameters():
        if p.ndim == 1 and 'resblocks' in name: p.data.add_(0.2 * torch.randn(p.shape))  # norms, biases off their start
    for name, p in model.moes.named_parameters(): p.data = torch.randn(p.shape) * spread(name, p)
    for moe in model.moes: moe.requires_grad_(True)  # gradients of all, of old routers too
    return model.eval()

@pytest.fixture(scope='module')
def models():
    single = random_model()
    return {torch.float32: single, torch.float64: copy.deepcopy(single).double()}

@dataclass
class Setting:
    "The second block of a tower, and what is put through it."
    model: AdaptedCLIP
    block: nn.Module
    moe: MoE
    w: dict[str, Tensor] # weights of the block, in double precision
    a: dict[str, Tensor] # adapters, in double precision
    x: Tensor # (n, tokens, d)
    loss: Tensor # (n, tokens, d), weights of a loss
    how: dict # heads and causal, for `block`
    mask: Tensor|None

def setting(models, tower, dtype=torch.float64, n=3):
    model = models[dtype]
    transformer = (model.clip.visual if tower == 'image' else model.clip).transformer
    moe = next(m for m in model.moes if m.tower == tower and m.block == 1)
    d, tokens, heads = (768, 197, 12) if tower == 'image' else (512, 77, 8)
    g = torch.Generator().manual_seed(1)
    randn = lambda: torch.randn(n, tokens, d, generator=g, dtype=torch.float64)
    here = transformer.resblocks[1]
    return Setting(
        model=model,
        block=here,
        moe=moe,
        w={name: p.detach().double() for name, p in here.named_parameters()},
        a={name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()},
        x=randn(),
        loss=randn(),
        how=dict(heads=heads, causal=tower == 'text'),
        mask=None if tower == 'image' else model.clip.attn_mask,
    )

def training_draws(
    n, # sequences
    tokens,
    dtype,
    seed,
): # (n, E) and (n, tokens, K*R)
    """What a training pass draws after `torch.manual_seed(seed)`: noise of the router, then the neurons that dropout
    keeps, best expert first."""
    torch.manual_seed(seed)
    eps = torch.randn(n, E, dtype=dtype)
    keep = F.dropout(torch.ones(n, tokens, K*R, dtype=dtype), P) > 0
    return eps.double(), keep.double()

def relative(found, wanted):
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


# ---- outputs and gradients

def by_the_formulas(s, dtype, training):
    "Output, gradients of input and adapters, experts that were chosen at all."
    x = s.x.clone().requires_grad_()
    draws = training_draws(*s.x.shape[:2], dtype, seed=5) if training else None
    y, chosen = block(x, s.w, s.a, **s.how, draws=draws)
    gradients = torch.autograd.grad((y * s.loss).sum(), [x, *s.a.values()], allow_unused=True)
    return y, gradients, {e for best in chosen for e in best}

def by_the_package(s, dtype, training):
    "Output, gradients of input and adapters."
    x = s.x.to(dtype).requires_grad_()
    mask = None if s.mask is None else s.mask.to(dtype)
    s.model.train(training)
    torch.manual_seed(5)
    y = encode.block(s.block, x, mask, adapters=partial(mixture, s.moe, task=TASK))
    gradients = torch.autograd.grad((y * s.loss.to(dtype)).sum(), [x, *s.moe.parameters()], allow_unused=True)
    s.model.eval()
    return y, gradients

def is_reached(
    name, # of a parameter, or 'input'
    used, # experts that a sequence chose
    training,
):
    "Does the loss depend on it? Not on other experts, nor on other tasks' routers, nor on noise in evaluation."
    if name == 'input': return True
    kind, number, *_, last = name.split('.')
    there = int(number) in used if kind == 'experts' else int(number) == TASK
    return there and (training or last != 'noise')

def differences(models, tower, dtype, training):
    "The largest difference of outputs, and of gradients (relative)."
    s = setting(models, tower, dtype)
    wanted, right, used = by_the_formulas(s, dtype, training)
    y, found = by_the_package(s, dtype, training)
    assert len(used) > K  # the sequences do not all go the same way
    worst = 0.
    for name, f, r in zip(['input', *s.a], found, right, strict=True):
        reached = is_reached(name, used, training)
        assert (r is not None and r.abs().max() > 0) == reached, name
        if reached: worst = max(worst, relative(f, r))
        else: assert f is None or (f == 0).all(), name
    assert 0.3 < wanted.std() < 3
    assert (wanted - block(s.x, s.w, None, **s.how)[0]).abs().max() > 0.1
    return (y.double() - wanted).abs().max().item(), worst

@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('tower', TOWERS)
def test_block_and_gradients_equal_the_formulas(models, tower, training):
    print(f'{tower}, {"training" if training else "evaluation"}: largest difference of outputs, gradients (relative):')
    report = {}
    for dtype in (torch.float64, torch.float32):
        report[dtype] = outputs, gradients = differences(models, tower, dtype, training)
        print(f'{str(dtype)[6:]} {outputs:.1e} {gradients:.1e}')
    double, single = report[torch.float64], report[torch.float32]
    assert double[0] < 1e-6 and double[1] < 1e-5  # what is asked
    assert double[0] < 1e-12 and double[1] < 1e-11  # what is measured, with a margin
    assert single[0] < 2e-5 and single[1] < 1e-5


@torch.no_grad()
def test_training_without_noise_would_be_noticed(models):
    s = setting(models, 'text')
    eps, keep = training_draws(*s.x.shape[:2], torch.float64, seed=5)
    said = lambda draws: block(s.x, s.w, s.a, **s.how, draws=draws)[0]
    wanted = said((eps, keep))
    for other in (None, (0 * eps, keep), (eps, 0 * keep + 1 - P)):
        assert (said(other) - wanted).abs().max() > 1e-2


def part(w, prefix):
    "The weights whose name begins so, without that."
    return {name.removeprefix(prefix): p for name, p in w.items() if name.startswith(prefix)}

def image_tower(model, w, g):
    "What comes before the blocks, what after them, and the same by the package; the number of heads."
    images = torch.randn(2, 3, 224, 224, generator=g, dtype=torch.float64)
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(2, 196, -1)
    patches = patches @ w['visual.conv1.weight'].flatten(1).T
    x = torch.cat([w['visual.class_embedding'].expand(2, 1, -1), patches], 1) + w['visual.positional_embedding']
    start = layer_norm(x, w['visual.ln_pre.weight'], w['visual.ln_pre.bias'])
    norm = lambda x: layer_norm(x, w['visual.ln_post.weight'], w['visual.ln_post.bias'])
    end = lambda x: norm(x[:, 0]) @ w['visual.proj']
    return start, end, lambda task: model.encode_image(images, task), 12

def text_tower(model, w, g):
    "What comes before the blocks, what after them, and the same by the package; the number of heads."
    tokens = torch.randint(1, 900, (3, 77), generator=g)
    rows, last = torch.arange(3), torch.tensor([5, 76, 20])
    tokens[:, 0], tokens[rows, last] = 998, 999
    start = w['token_embedding.weight'][tokens] + w['positional_embedding']
    norm = lambda x: layer_norm(x, w['ln_final.weight'], w['ln_final.bias'])
    end = lambda x: norm(x[rows, last]) @ w['text_projection']
    return start, end, lambda task: model.encode_text(tokens, task), 8

@pytest.mark.parametrize('tower', TOWERS)
def test_towers_equal_the_formulas(models, tower):
    model, g = models[torch.float64], torch.Generator().manual_seed(2)
    w = {name: p.detach() for name, p in model.clip.named_parameters()}
    start, end, ours, heads = (image_tower if tower == 'image' else text_tower)(model, w, g)
    prefix = 'visual.transformer.resblocks.' if tower == 'image' else 'transformer.resblocks.'
    moes = [m for m in model.moes if m.tower == tower]
    for task in (TASK, None):
        x = start
        for i, moe in enumerate(moes):
            a = None if task is None else {name: p.detach() for name, p in moe.named_parameters()}
            x, chosen = block(x, part(w, f'{prefix}{i}.'), a, heads=heads, causal=tower == 'text')
        if tower == 'text' and chosen: assert len(set(map(tuple, chosen))) == 1  # all prompts start alike
        with torch.no_grad(): found = ours(task)
        difference = (found - end(x)).abs().max()
        print(f'{tower} tower, task {task}: {difference:.1e} on features of standard deviation {found.std():.2f}')
        torch.testing.assert_close(found, end(x), rtol=0, atol=1e-12)


# ---- adapters off

def n_parameters(model):
    "How many parameters experts and routers have."
    count = lambda module: sum(p.numel() for p in module.parameters())
    return {name: sum(count(getattr(m, name)) for m in model.moes) for name in ('experts', 'routers')}

@torch.no_grad()
def test_switched_off_it_is_open_clip_bit_for_bit():
    clip, tokenizer = towers(), open_clip.get_tokenizer('ViT-B-16-quickgelu')
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    short = tokenizer(['a photo of a cat.', 'a photo of a very small dog.'])
    full = torch.randint(1, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    full[:, 0], full[:, -1] = 49406, 49407  # prompts that fill the context
    before = clip.encode_image(images), clip.encode_text(full), clip.encode_text(short)
    model = AdaptedCLIP(clip, n_experts=E, rank=R).eval()
    for _ in range(11): model.add_task()
    for moe in model.moes:
        for p in moe.experts.parameters(): p.fill_(0.01)
    assert torch.equal(model.encode_image(images), before[0])
    assert torch.equal(model.encode_text(full), before[1])
    assert torch.equal(model.clip.encode_text(short), before[2])
    cut = (model.encode_text(short) - before[2]).abs().max().item()  # our shorter context: other order of sums
    print(f'context cut to the longest prompt: {cut:.1e} on features of standard deviation {before[2].std():.2f}')
    assert cut < 1e-5 * before[2].abs().max()
    assert not torch.equal(model.encode_image(images, 0), before[0])
    assert not torch.equal(model.encode_text(full, 0), before[1])
    assert torch.equal(model.encode_image(images), before[0])  # and off again
    told = n_adapter_parameters(widths(model.clip), model.settings, 11)
    assert n_parameters(model) == told == {'experts': 43_625_472 // 6, 'routers': 7_434_240 // 6}  # of 12 blocks
