"""The adapted block against the formulas of the method (arXiv 2403.11549), written here a second time, plainly, at the shapes of ViT-B/16.

    x <- x + attn(ln_1(x));   x <- x + mlp(ln_2(x)) + y,   y = sum_e g_e E_e(x),   E_e(x) = s (W_up dropout(relu(W_down x + b_down)) + b_up)
    g = softmax over the k largest of h, 0 elsewhere,      h = x_0 W_gate (+ eps (softplus(x_0 W_noise) + 0.01) in training), x_0: token 0

Nothing here uses the package's experts, routers or mixtures, nor nn.MultiheadAttention: attention is a softmax over scores, the experts run one sequence at a time.
Outputs are compared by the largest absolute difference (outputs have a standard deviation of order 1), gradients by the largest difference over the largest entry of each tensor.
The comparison is in double precision, where a wrong formula shows and rounding does not, and once more in single precision, whose differences are printed (pytest -rP)."""
import copy
from functools import partial
import pytest, torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.clip import encode
from moe_merge_nb.layer.adapt import AdaptedCLIP, n_adapter_parameters
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.moe import mixture

E, R, K, S, P = 22, 64, 2, 0.1, 0.1          # experts, rank, top-k, scale, dropout
TOWERS = ['image', 'text']
TASK = 1                                     # of two


# ---- the formulas

def layer_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

def attention(x, w, heads, causal): # (n, tokens, d)
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

def experts(x, a, draws): # the mixture y of a batch of sequences; a: adapters; draws: (eps, keep) of training or None
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
            total = total + weights[rank] * S * (hidden @ a[f'experts.{e}.up.weight'].T + a[f'experts.{e}.up.bias'])
        y.append(total)
        chosen.append(best)
    return torch.stack(y), chosen

def block(x, w, a, heads, causal, draws=None): # one residual block; a None: adapters are off
    x = x + attention(layer_norm(x, w['ln_1.weight'], w['ln_1.bias']), w, heads, causal)
    y, chosen = experts(x, a, draws) if a else (0, None)
    return x + mlp(layer_norm(x, w['ln_2.weight'], w['ln_2.bias']), w) + y, chosen


# ---- the model under test

def random_model():
    "Widths, heads, tokens, experts and ranks of ViT-B/16, two blocks per tower, weights of the size that trained ones have"
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=224, patch_size=16, width=768, layers=2, head_width=64)
    model = AdaptedCLIP(CLIP(512, vision, CLIPTextCfg(vocab_size=1000, width=512, heads=8, layers=2), quick_gelu=True), E, R, K, S, P)
    for _ in range(2): model.add_task()
    for name, p in model.clip.named_parameters():
        if p.ndim == 1 and 'resblocks' in name: p.data.add_(0.2 * torch.randn(p.shape))          # norms and biases off their start
    for name, p in model.moes.named_parameters():
        p.data = torch.randn(p.shape) * (0.3 if p.ndim == 1 else 2 * p.shape[0]**-0.5 if 'routers' in name else 1.5 * p.shape[1]**-0.5)
    for moe in model.moes: moe.requires_grad_(True)                                               # gradients of all, of old routers too
    return model.eval()

@pytest.fixture(scope='module')
def models():
    single = random_model()
    return {torch.float32: single, torch.float64: copy.deepcopy(single).double()}

def setting(models, tower, dtype=torch.float64, n=3):
    "Of the second block of a tower: block, mixture, its weights, adapters, inputs (n, tokens, d), weights of a loss, keyword arguments of `block`, mask"
    model = models[dtype]
    here = (model.clip.visual if tower == 'image' else model.clip).transformer.resblocks[1]
    moe = next(m for m in model.moes if m.tower == tower and m.block == 1)
    d, tokens, heads = (768, 197, 12) if tower == 'image' else (512, 77, 8)
    w = {name: p.detach().double() for name, p in here.named_parameters()}
    a = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    g = torch.Generator().manual_seed(1)
    x, loss = torch.randn(n, tokens, d, generator=g, dtype=torch.float64), torch.randn(n, tokens, d, generator=g, dtype=torch.float64)
    mask = None if tower == 'image' else model.clip.attn_mask
    return model, here, moe, w, a, x, loss, dict(heads=heads, causal=tower == 'text'), mask

def training_draws(n, tokens, dtype, seed):
    "What a training pass draws after `torch.manual_seed(seed)`: noise of the router, then the neurons that dropout keeps, best expert first"
    torch.manual_seed(seed)
    return torch.randn(n, E, dtype=dtype).double(), (torch.nn.functional.dropout(torch.ones(n, tokens, K*R, dtype=dtype), P) > 0).double()

def relative(found, wanted): return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


# ---- outputs and gradients

@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('tower', TOWERS)
def test_block_and_gradients_equal_the_formulas(models, tower, training):
    report = {}
    for dtype in (torch.float64, torch.float32):
        model, here, moe, w, a, x, loss, how, mask = setting(models, tower, dtype)
        x_formula, x_ours = x.clone().requires_grad_(), x.to(dtype).requires_grad_()
        wanted, chosen = block(x_formula, w, a, **how, draws=training_draws(*x.shape[:2], dtype, seed=5) if training else None)
        gradients = torch.autograd.grad((wanted * loss).sum(), [x_formula, *a.values()], allow_unused=True)
        model.train(training)
        torch.manual_seed(5)
        y = encode.block(here, x_ours, None if mask is None else mask.to(dtype), adapters=partial(mixture, moe, task=TASK))
        ours = torch.autograd.grad((y * loss.to(dtype)).sum(), [x_ours, *moe.parameters()], allow_unused=True)
        model.eval()
        used = {e for best in chosen for e in best}
        assert len(used) > K                                                                     # the sequences do not all go the same way
        worst = 0.
        for name, found, right in zip(['input', *a], ours, gradients, strict=True):
            parts = name.split('.')
            reached = name == 'input' or int(parts[1]) in (used if parts[0] == 'experts' else {TASK}) and (training or parts[-1] != 'noise')
            assert (right is not None and right.abs().max() > 0) == reached, name
            if reached: worst = max(worst, relative(found, right))
            else: assert found is None or (found == 0).all(), name                               # neither other experts nor other tasks' routers
        report[dtype] = (y.double() - wanted).abs().max().item(), worst
        assert 0.3 < wanted.std() < 3 and (wanted - block(x, w, None, **how)[0]).abs().max() > 0.1
    print(f'{tower}, {"training" if training else "evaluation"}: largest difference of outputs, of gradients (relative): ' + ', '.join(f'{str(d)[6:]} {o:.1e} {g:.1e}' for d, (o, g) in report.items()))
    assert report[torch.float64][0] < 1e-6 and report[torch.float64][1] < 1e-5                  # what is asked
    assert report[torch.float64][0] < 1e-12 and report[torch.float64][1] < 1e-11                # what is measured, with a margin
    assert report[torch.float32][0] < 2e-5 and report[torch.float32][1] < 1e-5


def test_training_without_noise_would_be_noticed(models):
    model, here, moe, w, a, x, loss, how, mask = setting(models, 'text')
    eps, keep = training_draws(*x.shape[:2], torch.float64, seed=5)
    with torch.no_grad():
        wanted = block(x, w, a, **how, draws=(eps, keep))[0]
        for other in (None, (0 * eps, keep), (eps, 0 * keep + 1 - P)): assert (block(x, w, a, **how, draws=other)[0] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize('tower', TOWERS)
def test_towers_equal_the_formulas(models, tower):
    model = models[torch.float64]
    g = torch.Generator().manual_seed(2)
    w = {name: p.detach() for name, p in model.clip.named_parameters()}
    part = lambda prefix: {name.removeprefix(prefix): p for name, p in w.items() if name.startswith(prefix)}
    adapters = [{name: p.detach() for name, p in m.named_parameters()} for m in model.moes if m.tower == tower]
    if tower == 'image':
        images = torch.randn(2, 3, 224, 224, generator=g, dtype=torch.float64)
        patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(2, 196, -1) @ w['visual.conv1.weight'].flatten(1).T
        x = torch.cat([w['visual.class_embedding'].expand(2, 1, -1), patches], 1) + w['visual.positional_embedding']
        start, prefix, heads = layer_norm(x, w['visual.ln_pre.weight'], w['visual.ln_pre.bias']), 'visual.transformer.resblocks.', 12
        end = lambda x: layer_norm(x[:, 0], w['visual.ln_post.weight'], w['visual.ln_post.bias']) @ w['visual.proj']
        ours = lambda task: model.encode_image(images, task)
    else:
        tokens = torch.randint(1, 900, (3, 77), generator=g)
        last = torch.tensor([5, 76, 20])
        tokens[:, 0], tokens[torch.arange(3), last] = 998, 999
        start, prefix, heads = w['token_embedding.weight'][tokens] + w['positional_embedding'], 'transformer.resblocks.', 8
        end = lambda x: layer_norm(x[torch.arange(3), last], w['ln_final.weight'], w['ln_final.bias']) @ w['text_projection']
        ours = lambda task: model.encode_text(tokens, task)
    for task in (TASK, None):
        x = start
        for i, a in enumerate(adapters): x, chosen = block(x, part(f'{prefix}{i}.'), a if task is not None else None, heads, tower == 'text')
        assert tower == 'image' or not chosen or len({tuple(best) for best in chosen}) == 1     # all prompts start alike: one pair of experts
        with torch.no_grad(): found = ours(task)
        print(f'{tower} tower, task {task}: {(found - end(x)).abs().max():.1e} on features of standard deviation {found.std():.2f}')
        torch.testing.assert_close(found, end(x), rtol=0, atol=1e-12)


# ---- adapters off

@torch.no_grad()
def test_switched_off_it_is_open_clip_bit_for_bit():
    clip, tokenizer = load_clip('ViT-B-16-quickgelu', 'random')
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    short, full = tokenizer(['a photo of a cat.', 'a photo of a very small dog.']), torch.randint(1, 49406, (2, 77), generator=torch.Generator().manual_seed(0))
    full[:, 0], full[:, -1] = 49406, 49407                                                       # prompts that fill the context
    before = clip.encode_image(images), clip.encode_text(full), clip.encode_text(short)
    model = AdaptedCLIP(clip, E, R).eval()
    for _ in range(11): model.add_task()
    for moe in model.moes:
        for p in moe.experts.parameters(): p.fill_(0.01)
    assert torch.equal(model.encode_image(images), before[0]) and torch.equal(model.encode_text(full), before[1])
    assert torch.equal(model.clip.encode_text(short), before[2])
    cut = (model.encode_text(short) - before[2]).abs().max().item()                              # our shorter context: the same sums in another order
    print(f'text context cut to the longest prompt: {cut:.1e} on features of standard deviation {before[2].std():.2f}')
    assert cut < 1e-5 * before[2].abs().max()
    assert not torch.equal(model.encode_image(images, 0), before[0]) and not torch.equal(model.encode_text(full, 0), before[1])
    assert torch.equal(model.encode_image(images), before[0])                                    # and off again
    counts = {'experts': sum(p.numel() for m in model.moes for p in m.experts.parameters()), 'routers': sum(p.numel() for m in model.moes for p in m.routers.parameters())}
    assert counts == n_adapter_parameters([m.width for m in model.moes], E, R, 11) == {'experts': 43_625_472, 'routers': 7_434_240}
