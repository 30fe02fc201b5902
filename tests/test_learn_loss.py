"""Callbacks that change the loss or what is trained; other gates for one pass."""
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.features import Encoder
from moe_merge_nb.learn.learner import Callback, Learner
from moe_merge_nb.learn.loss import main_loss
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.learn.views import View, routed
from moe_merge_nb.select.select import Oracle
from moe_merge_nb.streams.tasks import toy_stream

SHORT = Train(iterations=4, batch=8, lr=1e-2, warmup=1)


def adapted(n_tasks=1, **how):
    torch.manual_seed(0)
    clip, tokenizer = load_clip('pico', 'random')
    model = AdaptedCLIP(clip, **{**dict(n_experts=4, rank=2), **how})
    for _ in range(n_tasks): model.add_task()
    return model, tokenizer


def weights(model): return {k: v.clone() for k, v in model.moes.state_dict().items()}


def trained(*callbacks, index=0, n_tasks=1, settings=SHORT):
    model, tokenizer = adapted(n_tasks)
    learner = train_task(model, toy_stream()[0], index, tokenizer, settings, callbacks=callbacks)
    return model, learner


class Same(Callback):
    "Hands everything through by name."
    def opens(self, model, found): return list(found)
    def main_loss(self, learner, images, labels, ce, **how): return ce(**how)
    def routing_loss(self, learner, routings): return None


def test_hooks_that_hand_through_change_no_bit():
    one, other = weights(trained()[0]), weights(trained(Same())[0])
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_method_may_weigh_images_by_itself():
    learner = Learner.__new__(Learner)
    learner.logits, learner.settings = torch.randn(6, 3), Train(label_smoothing=.1)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    class Half(Callback):
        def main_loss(self, learner, images, labels, ce, **how): return ce(reduction='none')[:3].mean()
    want = F.cross_entropy(learner.logits[:3], y[:3], label_smoothing=.1)
    torch.testing.assert_close(main_loss(learner, None, y, [Half()]), want)
    assert torch.equal(main_loss(learner, None, y, []), F.cross_entropy(learner.logits, y, label_smoothing=.1))


def test_a_loss_with_the_opposite_sign_forgets():
    class Forget(Callback):
        def main_loss(self, learner, images, labels, ce, **how): return -ce(**how)
        def after_step(self, learner): losses.append(learner.loss)
    losses = []
    trained(Forget(), settings=Train(iterations=12, batch=8, lr=1e-2, warmup=1))
    assert losses[-1] < losses[0] < 0


def test_routings_of_both_towers_come_with_gradients():
    towers = []
    class Watch(Callback):
        def routing_loss(self, learner, routings):
            towers.append([(r.tower, r.block) for r in routings])
            return 0 * sum(r.gates.sum() + r.logits.sum() for r in routings)
    model, learner = trained(Watch())
    blocks = {tower: [(m.tower, m.block) for m in model.moes if m.tower == tower] for tower in ('image', 'text')}
    assert towers[:2] == [blocks['text'], blocks['image']] and len(towers) == 2 * SHORT.iterations
    assert learner.counts().keys() == {*blocks['image'], *blocks['text']}


def test_a_loss_on_the_routing_of_prompts_moves_their_router():
    class Anchor(Callback):
        def opens(self, model, found): return [r.gate for m in model.moes if m.tower == 'text' for r in m.routers]
        def main_loss(self, learner, images, labels, ce, **how): return 0 * ce(**how)
        def routing_loss(self, learner, routings):
            if routings[0].tower == 'text': return sum(-r.logits.log_softmax(1)[:, 3].mean() for r in routings)
    model, learner = trained(Anchor(), settings=Train(iterations=30, batch=8, lr=3e-2, warmup=1))
    probe = []
    model.encode_text(learner.tokens, 0, probe.append)
    assert all((r.gates.argmax(1) == 3).all() for r in probe)
    images = {k: v for k, v in weights(model).items() if '.experts.' in k or int(k.split('.')[0]) == 0}
    begin = weights(adapted()[0])
    assert all(torch.equal(v, begin[k]) for k, v in images.items())


def test_exactly_what_is_opened_moves_even_if_it_is_frozen_or_of_an_old_task():
    class Open(Callback):
        def opens(self, model, found):
            moe = model.moes[1]
            return [*moe.experts[2].parameters(), *moe.routers[0].parameters()]
    model, tokenizer = adapted(2)
    model.moes[1].freeze([2])
    before = weights(model)
    train_task(model, toy_stream()[0], 0, tokenizer, SHORT, callbacks=[Open()])
    moved = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(('1.experts.2.', '1.routers.0.')) for k in moved)


@dataclass(frozen=True)
class Only:
    "One expert in every block of the image tower; the layer's own gates elsewhere."
    expert:int
    def __call__(self, moe, logits):
        if moe.tower != 'image': return moe.gate(logits)
        return torch.eye(logits.shape[1])[self.expert].expand_as(logits)


def other_experts():
    "A model whose experts differ, and its encoder."
    model, tokenizer = adapted(2)
    for e in (p for m in model.moes for p in m.experts.parameters()): torch.nn.init.normal_(e, std=.3)
    return model.eval(), tokenizer


@torch.no_grad()
def test_other_gates_for_one_pass():
    model, _ = other_experts()
    images, probe = torch.randn(3, 3, *model.clip.visual.image_size), []
    z = model.encode_image(images, 0, probe.append, Only(2))
    assert all((r.gates.argmax(1) == 2).all() and (r.gates.sum(1) == 1).all() for r in probe)
    assert not torch.allclose(z, model.encode_image(images, 0))
    assert torch.equal(model.encode_image(images, 0), model.encode_image(images, 0, None, lambda m, h: m.gate(h)))
    tasks = torch.tensor([0, -1, 1])
    mixed = model.encode_image(images, tasks, over=Only(2))
    torch.testing.assert_close(mixed[0], z[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], model.encode_image(images)[1], rtol=1e-4, atol=1e-5)


def test_what_other_gates_say_is_kept_apart_and_forgotten_when_their_expert_changes():
    model, tokenizer = other_experts()
    task, index, cache = toy_stream()[0], torch.arange(6), Cache()
    encoder = Encoder(model, tokenizer, cache)
    usual, forced = encoder.images(task, index, 0), encoder.images(task, index, 0, Only(1))
    assert not torch.allclose(usual, forced) and encoder.passes['images'] == 12
    assert torch.equal(encoder.images(task, index, 0, Only(1)), forced) and encoder.passes['images'] == 12
    with torch.no_grad(): model.moes[0].experts[1].up.bias += 1
    again = Encoder(model, tokenizer, cache)
    changed = again.images(task, index, 0, Only(1))
    assert again.passes['images'] == 6 and not torch.allclose(changed, forced)


def test_a_strategy_may_look_at_other_gates_features_and_classes():
    model, tokenizer = other_experts()
    stream, seen = toy_stream(), []
    def contrast(view:View):
        z, w = view.embed(view.s, Only(1)), view.classes(view.s, Only(1))
        logits = view.logits(view.s, Only(1))
        assert len(w) == logits.shape[1] or view.task is None
        torch.testing.assert_close(F.normalize(z, dim=1) @ w.T * model.logit_scale.exp(), logits, rtol=1e-3, atol=1e-3)
        seen.append(view.s)
        return routed(view)
    selectors = {'oracle': Oracle().fit(None).fit(None)}
    how = dict(selectors=selectors, after='toy', progress=False)
    one = evaluate(model, tokenizer, stream, predict=contrast, **how)
    other = evaluate(model, tokenizer, stream, **how)
    assert one.matrix.equals(other.matrix) and {0, 1} <= set(seen)


def test_a_strategy_may_look_at_other_gates_among_all_classes():
    model, tokenizer = other_experts()
    how = dict(selectors={'oracle': Oracle().fit(None).fit(None)}, after='toy', progress=False, classes=('all',))
    def forced(view): return view.logits(view.s, Only(1)) if view.s >= 0 else routed(view)
    def shaped(view):
        assert forced(view).shape == routed(view).shape
        return forced(view)
    one = evaluate(model, tokenizer, toy_stream(), predict=shaped, **how)
    assert one.matrix.accuracy.between(0, 100).all()


def test_a_mix_may_route_by_another_router_or_gate():
    from moe_merge_nb.layer.kinds import Experts
    from moe_merge_nb.layer.moe import MoE, mixture
    seen = []
    def twice(x, route, experts):
        own = route(x)
        all_alike = route(x, gate=lambda h: h.softmax(-1))
        other = route(x, router=route.moe.routers[0])
        seen.append((route.task, own, all_alike, other))
        return x
    moe = MoE('image', 0, 8, Experts(4, 3))
    moe.mix = twice
    for _ in range(2): moe.add_task()
    torch.nn.init.normal_(moe.routers[1].gate)
    moe.eval()
    x = torch.randn(5, 2, 8)
    mixture(moe, x, 1)
    task, own, all_alike, other = seen[0]
    assert task == 1 and torch.equal(own, moe.gate(moe.routers[1](x[:, 0])))
    assert torch.equal(all_alike, moe.routers[1](x[:, 0]).softmax(-1))
    assert torch.equal(other, moe.gate(moe.routers[0](x[:, 0])))


def test_no_callback_asks_for_routings_then_none_are_kept():
    class Look(Callback):
        def after_step(self, learner): kept.append(learner.routings)
    kept = []
    trained(Look())
    assert kept == [None] * SHORT.iterations


@pytest.mark.parametrize('hook', ['opens', 'main_loss', 'routing_loss', 'predict'])
def test_the_default_of_every_hook_is_known_as_one(hook):
    from moe_merge_nb.learn.learner import overrides
    assert not overrides(Callback(), hook)
    assert overrides(Same(), hook) == (hook != 'predict')
