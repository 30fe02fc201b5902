import copy
import pytest, torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.clip.encode import encode_image, encode_text
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_loop
from moe_merge_nb.layer.moe import *
from moe_merge_nb.layer.adapt import *
def trained_like(n_tasks=1, **kw):
    "An adapted random pico whose adapters do something."
    model, tokenizer = load_clip('pico', 'random')
    torch.manual_seed(0)
    adapted = AdaptedCLIP(model, **{'n_experts': 6, 'rank': 4, **kw})
    for _ in range(n_tasks): adapted.add_task()
    for p in adapted.moes.parameters(): torch.nn.init.normal_(p)
    tokens = tokenizer(['a photo of a cat.', 'a photo of a large dog.'])
    return adapted.eval(), torch.randn(4, 3, 32, 32), tokens


def test_zero_up_projections_are_frozen_clip_bit_for_bit():
    clip, tokenizer = load_clip('pico', 'random')
    images, tokens = torch.randn(4, 3, 32, 32), tokenizer(['a cat.', 'two dogs.'])
    with torch.no_grad():
        plain = encode_image(clip, images), encode_text(clip, tokens)
        theirs = clip.encode_image(images), clip.encode_text(tokens)
    adapted = AdaptedCLIP(clip, n_experts=6, rank=4)
    adapted.add_task()
    for mode in (True, False):
        adapted.train(mode)
        with torch.no_grad(): found = adapted.encode_image(images, 0), adapted.encode_text(tokens, 0)
        for ours, same, near in zip(found, plain, theirs):
            assert torch.equal(ours, same)
            torch.testing.assert_close(ours, near, rtol=1e-5, atol=1e-5)


def test_switched_off_is_plain_clip_bit_for_bit():
    adapted, images, _ = trained_like()
    clip, tokenizer = load_clip('pico', 'random')
    tokens = tokenizer(['two dogs', 'a ' * 30])           # the last one fills the context
    assert torch.equal(adapted.encode_image(images), clip.encode_image(images))
    with torch.no_grad(): assert torch.equal(adapted.encode_text(tokens), clip.encode_text(tokens))
    assert not torch.allclose(adapted.encode_image(images, 0), clip.encode_image(images), atol=1e-3)


def test_tasks_can_differ_from_image_to_image():
    adapted, images, _ = trained_like(n_tasks=2)
    task = torch.tensor([1, -1, 0, 1])
    mixed = adapted.encode_image(images, task)
    for i, t in enumerate(task.tolist()):
        single = adapted.encode_image(images[i:i+1], t if t >= 0 else None)
        torch.testing.assert_close(mixed[i:i+1], single, rtol=1e-5, atol=1e-5)


def test_a_tree_of_prompts_is_the_prompts_one_by_one():
    adapted, _, tokens = trained_like()
    with torch.no_grad(): tree, one_by_one = adapted.encode_prompts(tokens, 0), adapted.encode_text(tokens, 0)
    torch.testing.assert_close(tree, one_by_one, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='call eval'): adapted.train().encode_prompts(tokens, 0)
    last = lambda x, route, experts: mix_loop(x, route(x[:, -1:]), experts)                  # not routed by token 0
    adapted, _, tokens = trained_like(mix=last)
    assert torch.equal(adapted.encode_prompts(tokens, 0), adapted.encode_text(tokens, 0))


def test_the_experts_read_x_before_ln_2():
    adapted, images, _ = trained_like()
    v, moes = adapted.clip.visual, [m for m in adapted.moes if m.tower == 'image']
    x = v._embeds(images)
    for b, moe in zip(v.transformer.resblocks, moes):
        x = x + b.attention(b.ln_1(x))
        x = x + b.mlp(b.ln_2(x)) + mixture(moe, x, 0)
    torch.testing.assert_close(adapted.encode_image(images, 0), v.ln_post(x)[:, 0] @ v.proj, rtol=1e-4, atol=1e-4)


def test_a_copy_has_mixtures_of_its_own():
    adapted, images, _ = trained_like()
    before, twin = adapted.encode_image(images, 0), copy.deepcopy(adapted)
    for p in twin.moes.parameters(): torch.nn.init.zeros_(p)
    assert torch.equal(adapted.encode_image(images, 0), before)
    torch.testing.assert_close(twin.encode_image(images, 0), twin.encode_image(images))


def test_another_gate_function_can_be_passed_in():
    def first_routing(**how):
        adapted, images, _ = trained_like(**how)
        seen = []
        adapted.encode_image(images, 0, probe=seen.append)
        return seen
    seen = first_routing(gate='top_p', top_p=1.)
    assert (seen[0].gates > 0).all()
    seen = first_routing(gate=lambda h: (h == h.max(1, keepdim=True).values).float())
    assert (seen[0].gates.sum(1) == 1).all()


def test_only_what_is_named_is_opened():
    adapted, *_ = trained_like(n_tasks=2)
    adapted.moes[0].freeze([0, 1])
    params = trainable(adapted, 'adapters')
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == {id(p) for p in params}
    moe = adapted.moes[0]
    closed = [*adapted.clip.parameters(), *moe.experts[1].parameters(), *moe.routers[0].parameters()]
    assert not any(p.requires_grad for p in closed)


def test_shared_blocks_have_one_expert_that_every_task_uses():
    net = AdaptedCLIP(load_clip('pico', 'random')[0], n_experts=6, rank=4, shared_blocks=2).eval()
    net.add_task()
    sizes = [(m.tower, len(m.experts)) for m in net.moes]
    assert sizes == [('image', 1)]*2 + [('image', 6)]*2 + [('text', 1)]*2 + [('text', 6)]
    torch.manual_seed(0)
    x, seen = torch.randn(3, 3, 32, 32), []
    net.encode_image(x, 0, seen.append)
    assert all((r.gates == 1).all() for r in seen[:2]) and all((r.gates > 0).sum(1).eq(2).all() for r in seen[2:])
    with pytest.raises(ValueError, match='shared_blocks is -1'): Experts(shared_blocks=-1)


def test_the_count_is_the_models():
    for kinds in (dict(), dict(expert='norm', router='mlp'), dict(shared_blocks=2)):
        adapted, *_ = trained_like(n_tasks=3, **kinds)
        count = n_adapter_parameters(widths(adapted.clip), adapted.settings, 3)
        assert count['experts'] == sum(n_numbers(m.experts) for m in adapted.moes)
        assert count['routers'] == sum(n_numbers(m.routers) for m in adapted.moes)
