"""A weak model is heard where it is sure: the formulas of Mowst, its two losses, and what its gate learns and keeps."""
import math
import sys
import pytest
import torch
from torch.nn import functional as F
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.views import View, averaged, make_strategy
from moe_merge_nb.run import cli
from moe_merge_nb.run.afterwards import predict_with
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.strategies.afterwards import held_out, strategy_in
from moe_merge_nb.strategies.confidence import (
    DISPERSIONS, Confidence, LearnedConfidence, by_entropy, by_variance, dispersions, fit_gate, mixed, mowst_loss,
    mowst_star_loss, new_gate, star_as_released)
from moe_merge_nb.streams.tasks import toy_stream
from test_afterwards import SMALL
from toys import toy_model


def logits(n=2000, C=7, seed=0, scale=3.):
    "Of a weak and a strong model, and labels."
    g = torch.Generator().manual_seed(seed)
    draw = lambda: scale*torch.randn(n, C, generator=g)
    return draw(), draw(), torch.randint(C, (n,), generator=g)

def view_of(weak, strong): return View(0, 0, torch.zeros(len(weak), 2), {-1: weak, 0: strong}.get)


# ---- how sure

@pytest.mark.parametrize('C', [1, 2, 5, 20])
@pytest.mark.parametrize('D', DISPERSIONS.values(), ids=DISPERSIONS)
def test_a_sure_prediction_has_1_and_a_uniform_one_0(D, C):
    torch.testing.assert_close(D(torch.eye(C)), torch.ones(C), rtol=1e-5, atol=1e-5)
    if C > 1: torch.testing.assert_close(D(torch.full((3, C), 1/C)), torch.zeros(3), rtol=0, atol=1e-6)

def test_dispersions_are_their_formulas():
    p = torch.tensor([[.7, .2, .1]], dtype=torch.double)
    variance = sum((q - 1/3)**2 for q in (.7, .2, .1)) / 3
    one_hot = ((1 - 1/3)**2 + 2*(1/3)**2) / 3
    assert float(by_variance(p)) == pytest.approx(variance / one_hot)
    H = -sum(q*torch.tensor(q).double().log() for q in (.7, .2, .1))
    assert float(by_entropy(p)) == pytest.approx(float(1 - H/torch.tensor(3.).double().log()), rel=1e-5)

@pytest.mark.parametrize('D', DISPERSIONS.values(), ids=DISPERSIONS)
def test_a_sharper_prediction_is_surer(D):
    o, _, _ = logits()
    found = torch.stack([D((o/t).double().softmax(1)) for t in (8, 4, 2, 1, .5, .25)])
    assert (found.diff(dim=0) >= -1e-12).all() and (found >= -1e-9).all() and (found <= 1 + 1e-9).all()

@pytest.mark.parametrize('C', [2, 10, 20])
def test_a_double_softmax_is_never_sure(C):
    o, _, _ = logits(C=C, scale=20.)
    most = ((math.e - 1) / (math.e + C - 1))**2                 # of the surest: e/(e + C - 1), and 1/(e + C - 1)
    once, twice = dispersions(o)[:, 0], dispersions(o.softmax(1))[:, 0]
    assert float(once.max()) > .99 and float(twice.max()) == pytest.approx(most, rel=1e-3)
    if C == 10: assert most < .0216 and float(dispersions(o.softmax(1))[:, 1].max()) < .032
    if C == 20: assert most < .0063 and float(dispersions(o.softmax(1))[:, 1].max()) < .0145


# ---- mixing

def test_the_ends_are_the_two_models():
    weak, strong, _ = logits(50)
    v = view_of(weak, strong)
    assert torch.equal(Confidence(power=0.)(v), weak.softmax(1))
    torch.testing.assert_close(Confidence(power=1e4)(v), strong.softmax(1), rtol=0, atol=1e-3)
    half = mixed(weak.softmax(1), strong.softmax(1), torch.full((50,), .5))
    torch.testing.assert_close(averaged(v), half)

def test_the_mean_is_what_drawing_averages_to():
    weak, strong, _ = logits(3)
    c, g = torch.tensor([.1, .5, .8]), torch.Generator().manual_seed(0)
    drawn = sum(torch.where((torch.rand(3, 1, generator=g) < c[:, None]), weak, strong) for _ in range(4000)) / 4000
    torch.testing.assert_close(mixed(weak, strong, c), drawn, rtol=0, atol=.25)

def test_mixing_logits_is_not_mixing_probabilities():
    weak, strong, _ = logits(5000, 10)
    c = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    of_logits, of_p = mixed(weak, strong, c), mixed(weak.softmax(1), strong.softmax(1), c)
    assert .05 < float((of_logits.argmax(1) != of_p.argmax(1)).float().mean()) < .3


# ---- the losses

def test_the_loss_of_a_mixture_is_never_larger():
    weak, strong, y = logits(5000)
    c = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    each = lambda loss: torch.stack([loss(weak[i:i+1], strong[i:i+1], y[i:i+1], c[i:i+1]) for i in range(200)])
    assert (each(mowst_loss) >= each(mowst_star_loss) - 1e-5).all()
    p = mixed(weak.softmax(1), strong.softmax(1), c)
    assert mowst_loss(weak, strong, y, c) > mowst_star_loss(weak, strong, y, c)
    assert mowst_loss(weak, strong, y, c) > F.nll_loss(p.log(), y)

@pytest.mark.parametrize('loss', [mowst_loss, mowst_star_loss])
def test_full_and_no_confidence_are_the_loss_of_one_model(loss):
    weak, strong, y = logits(100)
    torch.testing.assert_close(loss(weak, strong, y, torch.ones(100)), F.cross_entropy(weak, y))
    torch.testing.assert_close(loss(weak, strong, y, torch.zeros(100)), F.cross_entropy(strong, y))

def test_no_gradient_reaches_the_weak_model_through_its_confidence():
    weak, strong, y = logits(20)
    weak.requires_grad_()
    G = new_gate(8)
    c = G(dispersions(weak))
    mowst_loss(weak.detach(), strong, y, c).backward()
    assert weak.grad is None and all(p.grad.abs().sum() > 0 for p in list(G.parameters())[-2:])


# ---- the gate

def taught(n=600, C=5):
    "A weak model that is right where it is sure, and a strong one that is right elsewhere."
    g = torch.Generator().manual_seed(0)
    y, sure = torch.randint(C, (n,), generator=g), torch.arange(n) % 2 == 0
    right, wrong = F.one_hot(y, C).float(), F.one_hot((y + 1) % C, C).float()
    weak = torch.where(sure[:, None], 6*right, .3*wrong)
    return weak, torch.where(sure[:, None], 3*wrong, 3*right), y, sure

@pytest.mark.parametrize('loss', ['mowst', 'star'])
def test_the_gate_learns_when_to_trust_whom(loss):
    weak, strong, y, sure = taught()
    torch.manual_seed(0)
    G = new_gate(8)
    losses = fit_gate(G, [(weak[:300], strong[:300], y[:300]), (weak[300:], strong[300:], y[300:])], loss, 200, .05)
    c = G(dispersions(weak))
    assert losses[-1] < .5*losses[0] and (c[sure] > .8).all() and (c[~sure] < .2).all()

def test_what_it_learns_is_decided_by_the_seed_and_by_training_images_alone():
    model, tokenizer = toy_model()
    stream = toy_stream(2, n_train=24, n_test=4)
    few, how = dict(steps=20, images=8), dict(progress=False)
    one, two, other = (LearnedConfidence(**few).fit(model, tokenizer, stream, seed=s, **how).state() for s in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one) and any(not torch.equal(one[k], other[k]) for k in one)
    blind = LearnedConfidence(**few).fit(model, tokenizer, held_out(stream, 3), seed=1, **how).state()
    assert all(torch.equal(one[k], blind[k]) for k in one)                          # other test images
    own = LearnedConfidence(routers='own', **few).fit(model, tokenizer, stream, seed=1, **how).state()
    assert any(not torch.equal(one[k], own[k]) for k in one)

def test_it_mixes_as_it_was_trained_unless_told_otherwise():
    weak, strong, _ = logits(40)
    v, state = view_of(weak, strong), new_gate(8).state_dict()
    def says(**how): return LearnedConfidence(**how).restore(state)(v)
    G = LearnedConfidence().restore(state).gate
    c = G(dispersions(weak)).detach()
    torch.testing.assert_close(says(loss='mowst'), mixed(weak.softmax(1), strong.softmax(1), c))
    torch.testing.assert_close(says(loss='star'), mixed(weak, strong, c))
    assert torch.equal(says(loss='star', mix='probabilities'), says(loss='mowst'))
    twice = G(dispersions(weak.softmax(1))).detach()
    torch.testing.assert_close(star_as_released(weak, strong, G), mixed(weak.softmax(1), strong.softmax(1), twice))
    assert float(twice.detach().std()) < .1*float(c.std())

@pytest.mark.parametrize('name, how, message', [
    ('confidence', dict(dispersion='range'), "dispersion is 'range': choose one of variance, entropy"),
    ('confidence', dict(power=-1), 'power is -1'),
    ('learned_confidence', dict(loss='kl'), "loss is 'kl': choose one of mowst, star"),
    ('learned_confidence', dict(steps=0), 'steps is 0'),
    ('learned_confidence', dict(lr=0), 'lr is 0')])
def test_numbers_that_cannot_be_are_refused(name, how, message):
    with pytest.raises(ValueError, match=message): make_strategy(name, **how)

def test_a_gate_that_has_not_learned_says_so():
    with pytest.raises(ValueError, match='call fit first'): LearnedConfidence()(view_of(*logits(2)[:2]))


# ---- on a finished run

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    d = tmp_path_factory.mktemp('confidence')
    job(composed(*SMALL), d/'run', progress=False)
    return d/'run'

def test_plain_clip_costs_no_further_image(run):
    passes = [next(iter(predict_with(run, s, progress=False).timings.values())) for s in ('routed', 'confidence')]
    assert passes[0]['images'] == passes[1]['images']

def test_the_learned_gate_is_kept_found_again_and_restored(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ['predict=learned_confidence', f'from={run}', 'predict_options={steps:20,images:8}', 'hydra.run.dir=kept']
    for _ in range(2):
        monkeypatch.setattr(sys, 'argv', ['moe-merge', *line, 'threads=1'])
        cli.main()
    out, err = capsys.readouterr()
    assert 'not run again' in err and 'learned_confidence' in out
    kept = load_result('kept', selectors=True, checked=True)
    assert kept.config['predict_options'] == dict(
        loss='mowst', mix='as_trained', routers='last', hidden=8, steps=20, lr=.05, images=8)
    assert sum(t.numel() for t in kept.strategy.values()) == 2*8 + 8 + 8 + 1
    back = strategy_in('kept')
    again = LearnedConfidence(steps=20, images=8)
    assert all(torch.equal(back.state()[k], kept.strategy[k]) for k in kept.strategy) and back.steps == again.steps

def test_a_gate_that_learns_is_for_finished_runs():
    with pytest.raises(UsageError, match='predict=learned_confidence from=RUN'):
        job(composed(*SMALL, 'predict=learned_confidence'), progress=False)
