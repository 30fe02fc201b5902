"""Strong minus weak: the formulas of SCMoE, what its second pass costs, and that it does not touch the first."""
import math
import sys
import pandas as pd
import pytest
import torch
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.views import View, make_strategy, routed
from moe_merge_nb.run import cli
from moe_merge_nb.select.select import Latest, Oracle
from moe_merge_nb.strategies.afterwards import held_out, views
from moe_merge_nb.strategies.contrast import Contrast, Random, Rank, Top, contrasted, contrasts, divergence
from moe_merge_nb.streams.tasks import toy_stream
from toys import SMALL, toy_model

CASES = {'4': {}, '1': dict(n_experts=1, top_k=1), 'shared': dict(shared_blocks=2)}

def some(n=500, classes=7, seed=0):
    "Logits of two passes."
    g = torch.Generator().manual_seed(seed)
    return 3*torch.randn(n, classes, generator=g), 3*torch.randn(n, classes, generator=g)


# ---- the formula

def test_the_contrast_is_its_formula():
    z_s, z_w = torch.tensor([[2., 1, -3]]), torch.tensor([[1., -1, 0]])
    assert contrasted(z_s, z_w, .5, .1).tolist() == [[2.5, 2., -math.inf]]          # -3 < 2 - ln 10
    assert contrasted(z_s, z_w, .5, 0.).tolist() == [[2.5, 2., -4.5]]               # all are plausible
    assert contrasted(z_s, z_w, 2., .1).argmax(1).tolist() == [1]                   # 4, 5

def test_without_beta_the_strong_pass_decides():
    z_s, z_w = some()
    assert torch.equal(contrasted(z_s, z_w, 0.).argmax(1), z_s.argmax(1))
    z = contrasted(z_s, z_w, 0.)
    assert torch.equal(z[z.isfinite()], z_s[z.isfinite()])

@pytest.mark.parametrize('beta', [.1, .9, 5.])
def test_two_passes_that_agree_leave_every_plausible_class_as_it_was(beta):
    z_s, _ = some()
    z = contrasted(z_s, z_s.clone(), beta)
    torch.testing.assert_close(z[z.isfinite()], z_s[z.isfinite()])

@pytest.mark.parametrize('alpha', [.01, .1, .5, 1.])
def test_plausible_is_a_share_of_the_largest_probability(alpha):
    z_s, z_w = some()
    kept, p = contrasted(z_s, z_w, 3., alpha).isfinite(), z_s.softmax(1)
    edge = alpha*p.amax(1, keepdim=True)
    assert (p[kept] >= edge.expand_as(p)[kept] - 1e-6).all() and (p[~kept] < edge.expand_as(p)[~kept] + 1e-6).all()
    assert kept.any(1).all() and not kept.all()

def test_the_divergence_is_kl_of_strong_from_weak():
    z_s, z_w = some(20)
    p, q = z_s.double().softmax(1), z_w.double().softmax(1)
    assert float(divergence(z_s, z_w)) == pytest.approx(float((p*(p/q).log()).sum(1).mean()), rel=1e-5)
    assert float(divergence(z_s, z_s)) == pytest.approx(0, abs=1e-6)


# ---- the weak pass

def test_a_rank_is_counted_from_the_best_and_closed_experts_stay_closed():
    h = torch.tensor([[2., 0, 3, 1], [0, 1, 2, -torch.inf], [-torch.inf, -torch.inf, 0, -torch.inf]])
    taken = [Rank(k)(None, h).argmax(1).tolist() for k in range(5)]
    assert taken == [[2, 2, 2], [0, 1, 2], [3, 0, 2], [1, 0, 2], [1, 0, 2]]
    for gates in (Rank(1)(None, h), Random()(toy_model()[0].moes[0], h)): assert (gates.sum(1) == 1).all()

@pytest.mark.parametrize('k, rank', [(1, 0), (1, 1)])
def test_rank_0_is_the_best_expert_alone(k, rank):
    model, _ = toy_model(top_k=k)
    x, same = torch.randn(3, 3, 32, 32), rank == 0
    assert torch.equal(model.encode_image(x, 0), model.encode_image(x, 0, over=Rank(rank))) is same
    assert torch.equal(model.encode_image(x, 0), model.encode_image(x, 0, over=Top(1)))

@pytest.mark.parametrize('kinds', CASES.values(), ids=CASES)
def test_layers_with_fewer_experts_take_the_last(kinds):
    model, tokenizer = toy_model(**kinds)
    v, _ = views(model, tokenizer, toy_stream(2, n_test=4))[1]
    z = Contrast(beta=.5, rank=3)(v)
    assert not z.isnan().any() and z.isfinite().any(1).all()
    if kinds.get('n_experts') == 1: assert torch.equal(z.argmax(1), routed(v).argmax(1))


# ---- as a strategy

@pytest.mark.parametrize('space', ['task', 'all'])
def test_the_second_pass_is_one_more_for_each_image_and_prompt(space):
    model, tokenizer = toy_model()
    stream = toy_stream(2, n_test=6)
    picks = {'oracle': Oracle().fit(None).fit(None), 'none': Latest().fit(None).fit(None)}
    def count(predict):
        how = dict(after=stream.names[-1], predict=predict, progress=False, classes=(space,))
        found = evaluate(model, tokenizer, stream, picks, **how)
        return found.passes['images'], found.passes['prompts']
    prompts, images = sum(len(t.classes)*len(t.templates) for t in stream), sum(len(t.test) for t in stream)
    (i, p), (i_2, p_2) = count(routed), count(Contrast())
    routers = 3                                         # task 0 by its own, both by the last
    assert i_2 - i == i - images == 6*routers
    assert p_2 - p == p - prompts >= 1.5*prompts

def test_the_strong_pass_is_routed_to_the_bit():
    model, tokenizer = toy_model()
    stream = toy_stream(2, n_test=6)
    [(v, _), *_], [(w, _), *_] = (views(model, tokenizer, stream) for _ in range(2))
    Contrast()(v)
    assert torch.equal(v.logits(v.s), routed(w))
    assert torch.equal(Contrast(beta=0.)(w).argmax(1), routed(w).argmax(1))

def test_plain_clip_has_nothing_to_contrast_with():
    logits = torch.tensor([[1., 2, 3]])
    v = View(0, -1, torch.zeros(1, 2), {(-1,): logits}.get, known={(-1,): logits})
    assert torch.equal(Contrast()(v), logits)

@pytest.mark.parametrize('how, message', [
    (dict(beta=-.1), 'beta is -0.1'), (dict(alpha=2), 'alpha is 2'),
    (dict(rank=1.5), 'rank is 1.5'), (dict(rank=-1), 'rank')])
def test_numbers_that_cannot_be_are_refused(how, message):
    with pytest.raises(ValueError, match=message): make_strategy('contrast', **how)


# ---- what is measured

def test_what_is_measured_is_what_it_says():
    model, tokenizer = toy_model(n_experts=22)
    seen = views(model, tokenizer, held_out(toy_stream(2, n_train=20), 8))
    rows = pd.DataFrame(contrasts(seen)).set_index(['weak', 'measure', 'beta']).value
    def right(z): return 100*sum(float((a.argmax(1) == y).float().mean()) for a, (_, y) in zip(z, seen))/2
    assert rows['', 'routed', 0] == pytest.approx(right([routed(v) for v, _ in seen]))
    assert rows['rank 2', 'contrast', .5] == pytest.approx(right([Contrast(.5, 2)(v) for v, _ in seen]))
    assert rows['top 1', 'alone', 0] == rows['rank 0', 'alone', 0]
    assert rows['top 2', 'alone', 0] == rows['', 'routed', 0]
    assert rows['CLIP', 'alone', 0] == pytest.approx(right([v.logits(-1) for v, _ in seen]))

def test_the_last_training_images_take_the_place_of_test_images():
    stream = toy_stream(2, n_train=20)
    for task, held in zip(stream, held_out(stream, 8)):
        assert len(held.test) == 8 and torch.equal(held.test[7][0], task.calibration[len(task.calibration) - 1][0])
        assert held.train is task.train

def test_a_run_that_predicts_by_it_trains_as_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for where, predict in (('plain', 'routed'), ('contrast', 'contrast')):
        monkeypatch.setattr(sys, 'argv', ['moe-merge', *SMALL, f'predict={predict}', f'hydra.run.dir={where}'])
        cli.main()
    plain, other = ((tmp_path/where/'adapters.safetensors').read_bytes() for where in ('plain', 'contrast'))
    assert plain == other
    assert load_result('contrast').config['predict'] == 'contrast'
