from functools import partial
import pytest
import torch
from moe_merge_nb.layer.adapt import trainable
from moe_merge_nb.learn.cache import *
from moe_merge_nb.layer.experts import read, write
from moe_merge_nb.streams.tasks import stack, toy_stream
import toys

toy_model = partial(toys.toy_model, n_experts=6)


def images_of(model, images, s, seen=None):
    "What a cache asks for: features of some rows of `images`, and the experts they went through"
    def compute(index):
        if seen is not None: seen.append(index.tolist())
        probe = Uses()
        with torch.no_grad(): z = model.encode_image(images[index], s, probe)
        return (z,), probe.of(model, 'image', len(index))
    return compute


def test_a_training_step_changes_the_experts_it_used_and_no_others():
    model, _ = toy_model(n_experts=22)
    (images, _), seen = stack(toy_stream(1)[0].train), Uses()
    optimizer = torch.optim.AdamW(trainable(model.train()), 1e-3, fused=True)
    before = versions(model)
    model.encode_image(images[:2], 1, seen).square().sum().backward()
    optimizer.step()
    after, used = versions(model), seen.of(model, 'image', 2).any(0)
    assert [a != b for a, b in zip(before.experts['image'], after.experts['image'])] == used.tolist()
    assert 0 < used.sum() < len(used) / 3
    assert before.experts['text'] == after.experts['text'] and before.rest == after.rest
    assert [a != b for a, b in zip(before.routers['image'], after.routers['image'])] == [False, True]


def test_every_way_of_writing_is_noticed():
    model, _ = toy_model()
    expert = model.moes[3].experts[2]
    def step():
        optimizer = torch.optim.SGD(expert.parameters(), 1.)
        expert.requires_grad_()(torch.ones(1, expert.down.in_features)).sum().backward()
        optimizer.step()
    state, other = read(expert), read(model.moes[3].experts[3])
    twice = {n: 2*t for n, t in state.items()}
    ways = [
        step,
        lambda: write(expert, other),
        lambda: expert.load_state_dict(twice),
        lambda: expert.up.bias.data.add_(1),
        lambda: setattr(expert.down.weight, 'data', 3*state['down.weight']),
        lambda: setattr(expert, 'scale', .5),
    ]
    for way in ways:
        before = versions(model).experts
        way()
        now = versions(model).experts
        assert [a != b for a, b in zip(before['image'], now['image'])].count(True) == 1
        assert before['text'] == now['text']


def test_anything_else_changes_the_rest():
    model, _ = toy_model()
    first = versions(model)
    assert versions(model) == first
    model.clip.visual.proj.data[0, 0] += 1
    second = versions(model)
    assert second.rest != first.rest and second.experts == first.experts
    model.moes[0].gate = lambda h: h.softmax(-1)
    assert versions(model).rest != second.rest


def test_uses_are_the_experts_that_matter():
    model, _ = toy_model()
    images, probe = stack(toy_stream(1)[0].test)[0], Uses()
    with torch.no_grad(): before = model.encode_image(images, 0, probe)
    used, E = probe.of(model, 'image', len(images)), len(model.moes[0].experts)
    for i in range(0, used.shape[1], 5):
        expert = model.moes[i // E].experts[i % E]
        state = read(expert)
        write(expert, {n: t + 1 for n, t in state.items()})
        with torch.no_grad(): now = model.encode_image(images, 0)
        write(expert, state)
        assert ((now - before).abs().amax(1) > 0).tolist() == used[:, i].tolist()


def test_prompts_go_the_same_way_and_other_mixtures_use_everything():
    model, tokenizer = toy_model()
    probe = Uses()
    model.encode_text(tokenizer(['a cat.', 'two large dogs.']), 0, probe)
    assert (probe.of(model, 'text', 5).sum(1) == 2 * len(model.clip.transformer.resblocks)).all()
    mean = lambda x, route, experts: sum(e(x) for e in experts)
    model, tokenizer = toy_model(mix=mean)
    probe = Uses()
    model.encode_image(torch.zeros(3, 3, 32, 32), 0, probe)
    assert probe.of(model, 'image', 3).all()


def test_what_is_known_is_not_computed_again():
    model, _ = toy_model()
    images, asked, cache = stack(toy_stream(1)[0].test)[0], [], Cache()
    cache.look(model)
    for rows in ([2, 0, 5], [0, 1, 2], [5, 5]):
        z, = cache.get('image', 'toy', 0, torch.tensor(rows), images_of(model, images, 0, asked))
        with torch.no_grad(): by_hand = model.encode_image(images[rows], 0)
        torch.testing.assert_close(z, by_hand, rtol=1e-4, atol=1e-4)
    assert asked == [[0, 2, 5], [1]]
    cache.look(model)
    cache.get('image', 'toy', 1, torch.tensor([0]), images_of(model, images, 1, asked))
    cache.get('image', 'other', 0, torch.tensor([0]), images_of(model, images, 0, asked))
    assert asked[2:] == [[0], [0]]                                  # other routers; another dataset


def test_a_changed_expert_costs_exactly_the_images_that_use_it():
    model, _ = toy_model()
    images, everyone, E = stack(toy_stream(1)[0].test)[0], torch.arange(24), 6
    for e in (1, 9, 14, 20):
        cache, asked = Cache(), []
        cache.look(model)
        z, = cache.get('image', 'toy', 0, everyone, images_of(model, images, 0))
        uses = next(iter(cache.rows.values())).uses
        expert = model.moes[e // E].experts[e % E]
        write(expert, {n: t + .1 for n, t in read(expert).items()})
        cache.look(model)
        now, = cache.get('image', 'toy', 0, everyone, images_of(model, images, 0, asked))
        mine = uses[:, e].nonzero().flatten().tolist()
        assert asked == ([mine] if mine else []) and torch.equal(now[~uses[:, e]], z[~uses[:, e]])
        with torch.no_grad(): by_hand = model.encode_image(images, 0)
        torch.testing.assert_close(now, by_hand, rtol=1e-4, atol=1e-4)


def test_a_changed_router_costs_all_images_of_its_task():
    model, _ = toy_model()
    images, asked, cache = stack(toy_stream(1)[0].test)[0], [], Cache()
    cache.look(model)
    for s in (0, 1): cache.get('image', 'toy', s, torch.arange(4), images_of(model, images, s))
    model.moes[2].routers[1].gate.data[0, 0] += 1
    model.add_task()                                                # a new task changes nothing for the others
    cache.look(model)
    for s in (0, 1): cache.get('image', 'toy', s, torch.arange(4), images_of(model, images, s, asked))
    assert asked == [[0, 1, 2, 3]] and len(cache.rows) == 2


def test_plain_clip_outlives_everything_but_clip():
    model, _ = toy_model()
    cache, forget = Cache(), torch.zeros(1, 0, dtype=torch.bool)
    def ask():
        x, = cache.get('image', 'toy', -1, torch.tensor([0]), compute=lambda i: ((torch.rand(1),), forget))
        return x.item()
    cache.look(model)
    first = ask()
    for p in model.moes.parameters(): p.data.add_(1)
    cache.look(model)
    assert ask() == first
    model.clip.logit_scale.data.add_(1)
    cache.look(model)
    assert ask() != first


def test_another_model_gate_or_mixture_hits_nothing():
    from moe_merge_nb.layer.mix import route_once
    model, _ = toy_model()
    def again(change):
        cache, other = Cache(), toy_model()[0]
        cache.look(other)
        def compute(i): return (torch.zeros(1),), torch.zeros(1, 24, dtype=torch.bool)
        for s in (-1, 0): cache.get('image', 'toy', s, torch.tensor([0]), compute=compute)
        change(other, cache)
        return len(cache.rows)
    images = object()
    assert again(lambda m, c: c.look(m)) == 2
    assert again(lambda m, c: c.look(toy_model(seed=1)[0])) == 1         # of the same CLIP
    assert again(lambda m, c: c.look(toy_model(n_experts=4)[0])) == 0
    def gate(m, c):
        m.moes[1].gate = lambda h: h.softmax(-1)
        c.look(m)
    def mix(m, c):
        m.moes[1].mix = lambda x, route, experts: route_once(x, route, experts)
        c.look(m)
    assert again(gate) == again(mix) == 0


def test_memory_is_bounded_and_can_be_switched_off():
    model, _ = toy_model()
    images, everyone = stack(toy_stream(1)[0].test)[0], torch.arange(24)
    for mb in (0, .002, .01, .02, 1):
        cache = Cache(mb)
        for n in range(4):
            cache.look(model)
            for s in (0, 1, 0):
                z, = cache.get('image', 'toy', s, everyone[n:n + 12], images_of(model, images, s))
                with torch.no_grad(): by_hand = model.encode_image(images[n:n + 12], s)
                torch.testing.assert_close(z, by_hand, rtol=1e-4, atol=1e-4)
                assert cache.nbytes <= mb*1e6
        assert (cache.nbytes > 0) == (mb >= .01)
    with pytest.raises(ValueError, match='cache_mb is -1'): Cache(-1)


def test_what_nobody_wants_makes_room():
    model, _ = toy_model()
    cache = Cache(.002)
    def compute(i): return (torch.zeros(4, 54),), torch.zeros(4, 0, dtype=torch.bool)
    def ask(names):
        cache.look(model)
        for name in names: cache.get('image', (name,), -1, torch.arange(4), compute=compute)
        return ''.join(key[1][0] for key in cache.rows)
    assert [ask(names) for names in ('abc', 'abc', 'bc', 'bc', 'bc')] == ['ab', 'ab', 'ab', 'bc', 'bc']
