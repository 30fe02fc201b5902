"""Cognitive experts: what nPMI says, what a boost changes and what it leaves alone, and the strategy made of both."""
from dataclasses import replace
from math import log2
import pandas as pd
import pytest
import torch
from toys import toy_model
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.features import Encoder
from moe_merge_nb.learn.views import View
from moe_merge_nb.select.select import Latest, Oracle
from moe_merge_nb.strategies.boosted import controls
from moe_merge_nb.strategies.cognitive import (
    Boost, Cognitive, associations, clip_wrong, first_images, npmi, strongest)
from moe_merge_nb.streams.tasks import Stream, stack, toy_stream

STREAM = toy_stream(2, n_train=24, n_test=12)

class Unread:
    "A dataset that nobody may read."
    labels = None
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): raise AssertionError('test images were read')

def unread(stream): return Stream(stream.name, tuple(replace(t, test=Unread(len(t.test))) for t in stream))

@pytest.fixture(scope='module')
def toy():
    "Model, tokenizer and a fitted strategy."
    model, tokenizer = toy_model(top_k=2)
    return model, tokenizer, Cognitive(beta=3., least=4).fit(model, tokenizer, unread(STREAM), progress=False)

def images_of(t=0): return stack(STREAM[t].test)[0]


# ---- nPMI

def test_npmi_is_1_with_the_event_0_without_relation_and_minus_1_if_they_never_meet():
    event = torch.tensor([True]*4 + [False]*12)
    half = torch.arange(16) % 2 == 0
    used = torch.stack([event, half, ~event, torch.ones(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)], 1)
    torch.testing.assert_close(npmi(used, event), torch.tensor([1., 0, -1, 0, -1]).double(), rtol=0, atol=1e-14)

def test_npmi_is_not_defined_where_both_happen_always():
    always = torch.ones(9, 1, dtype=torch.bool)
    assert npmi(always, always[:, 0]).isnan().all()
    assert npmi(always, torch.zeros(9, dtype=torch.bool)).tolist() == [-1]

def test_the_paper_s_counts_are_the_standard_definition():
    g = torch.Generator().manual_seed(0)
    used, event = torch.rand(200, 6, generator=g) < .3, torch.rand(200, generator=g) < .4
    for e, found in enumerate(npmi(used, event).tolist()):
        p, q, both = (v.double().mean().item() for v in (used[:, e], event, used[:, e] & event))
        assert abs(found - log2(both/(p*q)) / -log2(both)) < 1e-14

def test_the_strongest_have_run_often_enough_and_are_defined():
    found = pd.DataFrame(dict(block=[0, 0, 1, 1, 2], expert=[0, 3, 1, 2, 0], count=[9, 7, 8, 50, 50],
                              gate=[1.]*5, npmi=[.1, .9, .3, .3, float('nan')]))
    assert strongest(found) == (('image', 1, 1), ('image', 1, 2))
    assert strongest(found, 9) == (('image', 1, 1), ('image', 1, 2), ('image', 0, 0))
    assert strongest(found, 1, least=7) == (('image', 0, 3),)

def test_controls_are_other_experts_that_ran_as_often():
    found = pd.DataFrame(dict(block=[0]*6, expert=range(6), count=[40, 100, 38, 90, 5, 60], gate=[1.]*6, npmi=[0.]*6))
    best = ('image', 0, 0), ('image', 0, 1)
    other = controls(found, best)
    assert other['of equal count'] == (('image', 0, 2), ('image', 0, 3))
    assert len(other['random']) == 2 and {e for *_, e in other['random']} <= {2, 3, 5}


# ---- the boost

def seen_by(model, over, task=0):
    "Features and gates of every image block."
    gates = []
    z = model.encode_image(images_of(), task, lambda r: gates.append(r.gates), over=over)
    return z, gates

def test_a_factor_of_1_changes_no_bit(toy):
    model, *_ = toy
    every = tuple(('image', b, e) for b in range(4) for e in range(4))
    plain = seen_by(model, None)[0]
    assert all(torch.equal(plain, seen_by(model, Boost(every, 1., keep))[0]) for keep in (False, True))

def test_a_gate_is_multiplied_and_the_selection_stays(toy):
    model, *_ = toy
    before, after = seen_by(model, None)[1], seen_by(model, Boost((('image', 1, 2),), 4.))[1]
    factor = torch.tensor([1., 1, 4, 1])
    assert (before[1][:, 2] > 0).any() and torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], before[1]*factor)
    assert torch.equal(before[1] > 0, after[1] > 0) and not torch.equal(before[2], after[2])

def test_the_sum_of_gates_can_be_kept():
    moe, logits = toy_model(top_k=2)[0].moes[1], torch.tensor([[1., 2, 0, 0], [0, 3, 2, 0], [3, 2, 0, 0]])
    plain, kept = moe.gate(logits), Boost((('image', 1, 1),), 4., True)(moe, logits)
    torch.testing.assert_close(kept.sum(1), torch.ones(3))
    p = torch.tensor([1., 1, -1]).sigmoid() # of expert 1 among the two selected
    torch.testing.assert_close(plain[:, 1], p)
    torch.testing.assert_close(kept[:, 1], 4*p/(4*p + 1 - p))

def test_experts_that_are_not_selected_and_other_towers_are_left_alone(toy):
    model, tokenizer, _ = toy
    plain, gates = seen_by(model, None)
    idle = tuple(('image', b, e) for b, g in enumerate(gates) for e in range(4) if not (g[:, e] > 0).any())
    elsewhere = ('text', 0, 0), ('image', 0, 99), *idle
    assert torch.equal(plain, seen_by(model, Boost(elsewhere, 50.))[0])
    tokens = tokenizer(['a cat'])
    every = tuple(('image', b, e) for b in range(4) for e in range(4))
    assert torch.equal(model.encode_text(tokens, 0), model.encode_text(tokens, 0, over=Boost(every, 9.)))

def test_equal_boosts_are_one_key_of_the_cache():
    a, b = Boost((('image', 0, 1),), 2.), Boost((('image', 0, 1),), 2.)
    assert a == b and hash(a) == hash(b) and a != Boost((('image', 0, 1),), 2., True)


# ---- the strategy

def test_the_event_is_that_plain_clip_errs(toy):
    model, tokenizer, _ = toy
    encoder, (images, labels) = Encoder(model, tokenizer, Cache(0)), first_images(STREAM[0], 24)
    w = torch.nn.functional.normalize(encoder.classes(STREAM[0], -1), dim=-1)
    said = (torch.nn.functional.normalize(model.encode_image(images), dim=-1) @ w.T).argmax(1)
    assert torch.equal(clip_wrong(encoder, STREAM[0], images, labels), said != labels)

def test_experts_are_chosen_from_training_images_and_by_the_tasks_own_routers(toy):
    model, tokenizer, strategy = toy
    encoder = Encoder(model, tokenizer, Cache(0))
    for s, task in enumerate(STREAM):
        images, labels = first_images(task, 256)
        gates = []
        model.encode_image(images, s, lambda r: gates.append(r.gates > 0))
        found = associations(encoder, task, s, images, clip_wrong(encoder, task, images, labels))
        assert found['count'].tolist() == torch.stack(gates).sum(1).flatten().tolist()
        assert strategy.chosen[s] == strongest(found, 2, 4) and len(strategy.chosen[s]) == 2

def test_it_says_what_the_boosted_routers_say_and_plain_clip_as_it_is(toy):
    *_, strategy = toy
    asked = []
    view = View(0, 1, torch.zeros(3, 8), lambda *a: asked.append(a) or torch.zeros(3, 2))
    strategy(view)
    strategy(replace(view, s=-1, known={}))
    assert asked == [(1, Boost(strategy.chosen[1], 3.)), (-1,)]

def test_an_event_may_be_a_class_and_then_only_its_task_is_boosted(toy):
    model, tokenizer, _ = toy
    name = STREAM[1].classes[2]
    strategy = Cognitive(event=name, least=2).fit(model, tokenizer, STREAM, progress=False)
    assert strategy.chosen[0] == () and len(strategy.chosen[1]) == 2
    with pytest.raises(ValueError, match="event is 'a unicorn', which goes with no expert in any of the tasks"):
        Cognitive(event='a unicorn').fit(model, tokenizer, STREAM, progress=False)

def test_it_is_restored_from_its_state(toy):
    *_, strategy = toy
    assert all(isinstance(v, torch.Tensor) for v in strategy.state().values())
    assert Cognitive(beta=3.).restore(strategy.state()).chosen == strategy.chosen
    partly = Cognitive()
    partly.chosen = (), (('image', 2, 1),), ()
    assert Cognitive().restore(partly.state()).chosen == partly.chosen

def test_it_costs_no_further_pass_with_any_selector_and_label_space(toy):
    model, tokenizer, strategy = toy
    chosen = dict(oracle=Oracle(), none=Latest())
    for s in chosen.values(): s.n_tasks = 2
    how = dict(selectors=chosen, after='circles', classes=('task', 'all'), progress=False)
    plain = evaluate(model, tokenizer, STREAM, **how)
    boosted = evaluate(model, tokenizer, STREAM, predict=strategy, **how)
    same = Cognitive(beta=1.).restore(strategy.state())
    assert boosted.passes == plain.passes
    assert plain.matrix.equals(evaluate(model, tokenizer, STREAM, predict=same, **how).matrix)
    assert boosted.selection.equals(plain.selection)

@pytest.mark.parametrize('wrong, said', [
    (dict(beta=0), 'beta is 0: choose a number above 0'),
    (dict(beta=float('nan')), 'beta is nan'),
    (dict(n=0), 'n is 0: choose a whole number, 1 or more'),
    (dict(event=3), "event is 3: choose 'wrong' or the name of a class"),
])
def test_options_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said): Cognitive(**wrong)

def test_it_must_be_fitted_first():
    with pytest.raises(ValueError, match='no experts are chosen yet'):
        Cognitive()(View(0, 0, torch.zeros(1, 4), lambda s: torch.zeros(1, 2)))
