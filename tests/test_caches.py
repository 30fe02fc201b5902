"Features that are kept are those that would be computed now: whatever decides an answer is compared by content"

import copy
from dataclasses import replace
from functools import partial
import pytest
import torch
from torch import nn
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.layer.experts import Expert
from moe_merge_nb.layer.mix import mix_loop
from moe_merge_nb.layer.router import Router, top_k_gates
from moe_merge_nb.learn.cache import Cache, versions
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.features import Encoder
from moe_merge_nb.rewrites.bank import banks, bind, with_banks
from moe_merge_nb.safe.content import content
from moe_merge_nb.select.select import Latest, Oracle
from moe_merge_nb.streams.tasks import Images, toy_stream

STREAM = toy_stream(2, n_test=8)

class Mine(Expert):
    "Has all that decides an answer and is no parameter"
    power = 1.
    def __init__(self, width, rank, scale=1., dropout=.1):
        super().__init__(width, rank, scale, dropout)
        self.register_buffer('mask', torch.ones(rank))
        self.register_buffer('hidden_mask', torch.ones(rank), persistent=False)
        self.bend, self.table, self.tensor = 1., dict(by=[1., 1.]), torch.ones(1)

    def hidden(self, x):
        by = self.bend * self.table['by'][1] * self.tensor.to(x) * self.power
        return by * super().hidden(x) * self.mask * self.hidden_mask

class Warm(Router):
    temperature = 1.
    def __init__(self, width, n_experts):
        super().__init__(width, n_experts)
        self.limits = [0., 1e3]

    def score(self, x0): return (x0 @ self.gate / self.temperature).clamp(max=self.limits[1])

STRENGTH = [1.]

def gate(logits): return STRENGTH[0] * top_k_gates(logits, 2)
def soft(logits, k=2, by=1.): return by * top_k_gates(logits, k)
def mix(x, route, experts, sharp=1.): return mix_loop(x, sharp * route(x), experts)
def capturing(box): return lambda logits: box['by'] * top_k_gates(logits, 2)

def model_of(**kinds):
    "Adapters that say something"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AdaptedCLIP(copy.deepcopy(BACKBONE), n_experts=4, rank=4, scale=1., **kinds)
        for _ in STREAM: model.add_task()
        for m in model.moes:
            for e in m.experts: nn.init.normal_(e.up.weight, std=.3)
            for r in m.routers: nn.init.normal_(r.gate)
    return model.eval()

def narrow():
    "A CLIP of two blocks a tower"
    image = CLIPVisionCfg(image_size=32, patch_size=16, width=16, layers=2, head_width=8)
    text = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIP(16, image, text).eval().requires_grad_(False)

BACKBONE, TOKENIZER = narrow(), pico_tokenizer()

def row(model, cache=None, tokenizer=TOKENIZER, stream=STREAM):
    "Two accuracies of two selectors"
    picks = {'oracle': Oracle().fit(None).fit(None), 'none': Latest().fit(None).fit(None)}
    found = evaluate(model, tokenizer, stream, picks, after='x', cache=cache, progress=False)
    return found.matrix.accuracy.tolist(), found.passes

def features(model, cache, tokenizer=TOKENIZER, stream=STREAM):
    "All that an evaluation asks for"
    e = Encoder(model, tokenizer, cache)
    index, asked = torch.arange(8), [-1, 0, 1]
    texts = [e.classes(t, s) for t in stream for s in asked]
    return torch.cat([*texts, *(e.images(t, index, s) for t in stream for s in (0, 1))]), e.passes

def same_as_fresh(model, cache, **how):
    "What the cache answers is what a fresh one does"
    kept, fresh = features(model, cache, **how)[0], features(model, Cache(), **how)[0]
    torch.testing.assert_close(kept, fresh, rtol=1e-4, atol=1e-4)
    return fresh

SETTINGS = dict(expert=Mine, router=Warm, gate=gate, mix=mix)
def every(model, change):
    for m in model.moes:
        for e in m.experts: change(e)

CHANGES = {
    'a buffer': lambda m: every(m, lambda e: e.mask.mul_(2)),
    'a buffer that is not saved': lambda m: every(m, lambda e: e.hidden_mask.mul_(2)),
    'a number': lambda m: every(m, lambda e: setattr(e, 'bend', 2.)),
    'a number in a list in a dictionary': lambda m: every(m, lambda e: e.table['by'].__setitem__(1, 2.)),
    'a tensor that is no buffer': lambda m: every(m, lambda e: e.tensor.mul_(2)),
    'the scale': lambda m: every(m, lambda e: setattr(e, 'scale', 2.)),
    'a child': lambda m: every(m, lambda e: e.down.register_forward_hook(lambda *a: a[-1] * 2)),
    'a router': lambda m: [setattr(r, 'temperature', .2) for moe in m.moes for r in moe.routers],
    'a list of a router': lambda m: [r.limits.__setitem__(1, .1) for moe in m.moes for r in moe.routers],
    'what is closed': lambda m: [r.closed[:2].fill_(True) for moe in m.moes for r in moe.routers],
    'a gate': lambda m: [setattr(moe, 'gate', lambda logits: logits.softmax(-1)) for moe in m.moes],
    'an option of a gate': lambda m: [setattr(moe, 'gate', partial(soft, k=1)) for moe in m.moes],
    'a mix': lambda m: [setattr(moe, 'mix', lambda *a: 2 * mix_loop(a[0], a[1](a[0]), a[2])) for moe in m.moes],
    'an option of a mix': lambda m: [setattr(moe, 'mix', partial(mix, sharp=3.)) for moe in m.moes],
    'the frozen model': lambda m: m.clip.visual.ln_post.weight.mul_(torch.linspace(.1, 3, 16)),
    'a number of the frozen model': lambda m: setattr(m.clip.visual.ln_post, 'eps', 1.),
    'a hook on the frozen model': lambda m: m.clip.transformer.resblocks[0].register_forward_hook(lambda *a: a[-1] * 3),
    'a hook before': lambda m: m.clip.visual.ln_post.register_forward_pre_hook(lambda m, a: (a[0].abs(),)),
}

@torch.no_grad()
@pytest.mark.parametrize('what', CHANGES)
def test_whatever_decides_an_answer_is_seen(what):
    model, cache = model_of(**SETTINGS), Cache()
    before = same_as_fresh(model, cache)
    CHANGES[what](model)
    after = same_as_fresh(model, cache)
    assert not torch.allclose(before, after, atol=1e-3), 'the change should have done something'

@torch.no_grad()
def test_values_around_a_function_and_those_it_captured_are_seen():
    box = dict(by=1.)
    for gate_, change in ((gate, lambda: STRENGTH.__setitem__(0, 2.)), (capturing(box), lambda: box.update(by=2.))):
        model, cache = model_of(expert=Mine, gate=gate_), Cache()
        before = same_as_fresh(model, cache)
        change()
        try: assert not torch.allclose(before, same_as_fresh(model, cache), atol=1e-3)
        finally: STRENGTH[0] = 1.
    model, cache = model_of(expert=Mine), Cache()
    before = same_as_fresh(model, cache)
    try:
        Mine.power = 2.
        assert not torch.allclose(before, same_as_fresh(model, cache), atol=1e-3)
    finally: Mine.power = 1.

def test_nothing_is_forgotten_without_need():
    "The same model, a deep copy, a frozen expert, another task, training mode: nothing is encoded again"
    for kinds in ({}, SETTINGS):
        model, cache = model_of(**kinds), Cache()
        features(model, cache)
        model.moes[0].freeze([1])
        model.train().eval()
        assert features(copy.deepcopy(model), cache)[1].total() == 0
        model.add_task()
        assert features(model.eval(), cache)[1].total() == 0

def test_what_cannot_be_looked_into_is_never_kept(tmp_path):
    model, cache = model_of(expert=Mine), Cache()
    with open(tmp_path/'x', 'w') as model.moes[0].experts[0].file:
        passes = [features(model, cache)[1]['images'] for _ in range(2)]
    assert passes[1] > 0

def test_a_bank_with_exchanged_columns_is_another_model():
    model, cache = model_of(), Cache()
    row(model, cache)
    for swap in ([1, 0, 3, 2],):
        new = [replace(b, column_to_expert=b.column_to_expert[:, swap]) for b in banks(model)]
        small = with_banks(model, new)
        assert row(small, cache)[0] == row(small)[0]
        same_as_fresh(small, cache)
    loud = with_banks(model, [replace(b, always_on=torch.tensor([2., 0, 0, 0])) for b in banks(model)])
    same_as_fresh(loud, cache)
    assert not torch.allclose(features(loud, Cache())[0], features(model, Cache())[0], atol=1e-2)

def test_a_bound_model_is_evaluated_twice_with_one_cache():
    "Its routers have more columns than there are experts"
    model, cache = model_of(), Cache()
    small = with_banks(model, [bind(b, [[0, 1], [2, 3]], [b.states[0], b.states[2]]) for b in banks(model)])
    first, again = row(small, cache), row(small, cache)
    assert first[0] == again[0] == row(small)[0] and again[1]['images'] == again[1]['prompts'] == 0
    with torch.no_grad(): small.moes[1].experts[0].up.weight.add_(.3)
    assert row(small, cache)[0] == row(small)[0]

def test_another_tokenizer_is_another_question():
    model, cache = model_of(), Cache()
    def backwards(texts): return TOKENIZER([t[::-1] for t in texts])
    before = same_as_fresh(model, cache)
    assert not torch.allclose(before, same_as_fresh(model, cache, tokenizer=backwards), atol=1e-2)
    same_as_fresh(model, cache)

def test_images_are_known_by_content():
    model, cache, (task, other) = model_of(), Cache(), STREAM
    mine = replace(task, test=Images(task.test.images.clone(), task.test.labels))
    stream = [mine, other]
    before = same_as_fresh(model, cache, stream=stream)
    copied = [replace(mine, test=copy.deepcopy(mine.test)), other]
    assert features(model, cache, stream=copied)[1].total() == 0                # another object, the same images
    mine.test.images[3] = 255 - mine.test.images[3]
    assert not torch.allclose(before, same_as_fresh(model, cache, stream=stream), atol=1e-2)

def test_content_is_of_all_that_a_thing_holds():
    x, cell = torch.arange(6.), [1]
    def scaled(by): return lambda h: by * h
    cell.append(cell)                                                           # it holds itself
    equal = [(x, x.clone()), (scaled(2), scaled(2)), (partial(scaled, by=2), partial(scaled, by=2)), (cell, cell),
             ({'a': [x]}, {'a': [x.clone()]}), (nn.Linear, nn.Linear), (Cache(), Cache())]
    for a, b in equal: assert content(a) == content(b)
    model = model_of()
    assert versions(model) == versions(copy.deepcopy(model))
    others = [(x, x.view(2, 3)), (x, x.double()), (scaled(2), scaled(3)), ([1, 2], [2, 1]), ((1,), [1]), (1, 1.),
              (1, True), ({'a': 1}, {'a': 2}), (Cache(1), Cache(2)), ('1', 1), ([[1], 2], [[1, 2]])]
    for a, b in others: assert content(a) != content(b)
