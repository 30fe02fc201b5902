"""Compressed experts: what a vector does and does not do; and the whole from the command line, killed and gone on
with."""
import copy
import pytest
import torch
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.experts import EXPERTS, Expert, algebra_of, read, write
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import MIXES, mix_loop, route_once
from moe_merge_nb.layer.moe import MoE, Route
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.run.share import load, save
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.variants.compressed import (
    CompressedExpert, VectorsOnly, main_gates, mix_main_and_aux, shares, vectors)
from toys import ends_alike, toy_model, whole_and_killed

PARTS = dict(expert='compressed', mix='main_and_aux', top_k=4)


def layer(**how):
    "A layer of six experts with random matrices and vectors of ones, a router for one task, and sequences."
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=6, rank=3, scale=1., **{**PARTS, **how})).eval()
    moe.add_task()
    moe.double()
    for name, p in moe.named_parameters():
        if 'into' not in name and 'inner' not in name: torch.nn.init.normal_(p)
    return moe, torch.randn(5, 4, 8).double()

def others(moe):
    "Give all vectors other values than one."
    for e in moe.experts:
        for v in (e.into, e.inner): torch.nn.init.normal_(v)

# ---- the expert

def test_the_names_mean_its_parts():
    settings = Experts(**PARTS)
    assert settings.part('expert') is CompressedExpert and settings.part('mix') is mix_main_and_aux
    assert isinstance(EXPERTS['compressed'], str) and isinstance(MIXES['main_and_aux'], str)
    m = method('compressed').experts
    assert (m.expert, m.mix, m.top_k) == ('compressed', 'main_and_aux', 4)

def test_with_vectors_of_ones_it_is_an_expert():
    plain, e = Expert(8, 3).eval(), CompressedExpert(8, 3).eval()
    for p in plain.parameters(): torch.nn.init.normal_(p)
    write(e, {**read(plain), 'into': torch.ones(8), 'inner': torch.ones(3)})
    x = torch.randn(5, 8)
    assert torch.equal(e(x), plain(x)) and torch.equal(e(x, torch.ones(8), torch.ones(3)), plain(x))

def test_it_is_its_formula_with_the_vectors_of_others():
    e, x, into, inner = CompressedExpert(8, 3, scale=.5).eval(), torch.randn(5, 8), torch.randn(8), torch.randn(3)
    for p in e.parameters(): torch.nn.init.normal_(p)
    hidden = inner * ((into * x) @ e.down.weight.T + e.down.bias).relu()
    torch.testing.assert_close(e(x, into, inner), .5 * (hidden @ e.up.weight.T + e.up.bias))

@pytest.mark.parametrize('d, r, plain, more', [(128, 16, 4240, 144), (768, 64, 99136, 832)])
def test_vectors_cost_d_plus_r_numbers(d, r, plain, more):
    assert sum(p.numel() for p in Expert(d, r).parameters()) == plain
    assert sum(p.numel() for p in CompressedExpert(d, r).parameters()) == plain + more

def test_it_has_no_algebra():
    assert algebra_of(CompressedExpert(8, 2)) is None

# ---- who runs

def test_half_of_what_a_sequence_selects_runs_and_its_gates_stay():
    gates = torch.tensor([[.4, 0., .1, .3, .2], [0., .5, .3, .2, 0.], [0., 0., 0., 0., 1.]])
    want = torch.tensor([[.4, 0., 0., .3, 0.], [0., .5, .3, 0., 0.], [0., 0., 0., 0., 1.]])
    assert torch.equal(main_gates(gates), want)
    assert torch.equal(main_gates(gates, 1)[0], torch.tensor([.4, 0., 0., 0., 0.]))

def test_vectors_are_averaged_by_gates_that_sum_to_1_and_are_ones_without_any():
    aux, each = torch.tensor([[0., .1, .3], [0., 0., 0.]]), torch.tensor([[9., 9.], [1., 2.], [5., 6.]])
    torch.testing.assert_close(vectors(aux, each), torch.tensor([[[4., 5.]], [[1., 1.]]]))

def test_in_the_beginning_it_is_the_main_experts_and_not_all():
    moe, x = layer()
    gates = Route(moe, 0)(x)
    y = mix_main_and_aux(x, Route(moe, 0), moe.experts)
    torch.testing.assert_close(y, mix_loop(x, main_gates(gates), moe.experts))
    assert (y - mix_loop(x, gates, moe.experts)).abs().max() > .1

def test_it_is_its_formula():
    moe, x = layer()
    others(moe)
    gates = Route(moe, 0)(x)
    for i in range(len(x)):
        order = gates[i].argsort(descending=True)
        main, aux = order[:2].tolist(), order[2:4].tolist()
        share = gates[i, aux] / gates[i, aux].sum()
        into = sum(w * moe.experts[e].into for w, e in zip(share, aux))
        inner = sum(w * moe.experts[e].inner for w, e in zip(share, aux))
        by_hand = sum(gates[i, e] * moe.experts[e](x[i], into, inner) for e in main)
        torch.testing.assert_close(mix_main_and_aux(x, Route(moe, 0), moe.experts)[i], by_hand)

def test_without_auxiliary_experts_it_is_the_default_mixture():
    moe, x = layer()
    others(moe)
    y = mix_main_and_aux(x, Route(moe, 0), moe.experts, main=4)
    torch.testing.assert_close(y, route_once(x, Route(moe, 0), moe.experts))

def test_only_auxiliary_experts_vectors_have_a_gradient():
    moe, x = layer()
    others(moe)
    gates = Route(moe, 0)(x)
    aux = (gates - main_gates(gates) > 0).any(0)
    assert aux.any() and not aux.all()                      # both kinds are there
    mix_main_and_aux(x, Route(moe, 0), moe.experts).square().sum().backward()
    for e, is_aux in zip(moe.experts, aux.tolist()):
        for v in (e.into, e.inner): assert (v.grad.abs().max() > 0) == is_aux

def test_prompts_are_encoded_as_in_training():
    model, tokenizer = toy_model(**PARTS)
    tokens = tokenizer(['a photo of a dog', 'a photo of a cat', 'a dog'])
    torch.testing.assert_close(model.encode_prompts(tokens, 1), model.encode_text(tokens, 1), rtol=1e-4, atol=1e-5)

# ---- training

def moved(callbacks):
    "Names of what two iterations change in a toy model with experts that speak."
    model, tokenizer = toy_model(1, **{**PARTS, 'n_experts': 6})
    before = copy.deepcopy(model.state_dict())
    settings = Train(iterations=2, batch=8, warmup=0, lr=1e-2)
    train_task(model, toy_stream(1)[0], 0, tokenizer, settings=settings, callbacks=callbacks)
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}

def test_vectors_only_leaves_the_matrices():
    found = moved([VectorsOnly()])
    assert any(n.endswith('.into') for n in found) and any(n.endswith('.inner') for n in found)
    assert not any('.down.' in n or '.up.' in n for n in found) and any('.routers.' in n for n in found)
    assert any('.up.' in n for n in moved([]))

def test_a_vector_that_is_never_auxiliary_stays_ones():
    model, tokenizer = toy_model(1, **{**PARTS, 'n_experts': 6, 'options': dict(mix=dict(main=3))})
    aux = {}
    class See(Callback):
        def routing_loss(self, learner, routings):
            for r in routings:
                found = (r.gates - main_gates(r.gates, 3) > 0).any(0)
                aux[r.tower, r.block] = aux.get((r.tower, r.block), False) | found
    settings = Train(iterations=2, batch=4, warmup=0, lr=1e-2, weight_decay=0.)
    train_task(model, toy_stream(1)[0], 0, tokenizer, settings=settings, callbacks=[See()])
    kinds = set()
    for moe in model.moes:
        for e, was in zip(moe.experts, aux[moe.tower, moe.block].tolist()):
            kinds.add(was)
            assert was or torch.equal(e.into, torch.ones_like(e.into))
            assert not was or not torch.equal(e.into, torch.ones_like(e.into))
    assert kinds == {True, False}

@pytest.mark.parametrize('mass', [1e-3, 1e-12, 1e-25, 5e-42, 0.])
def test_gradients_are_finite_however_sure_the_router_is(mass):
    aux = torch.tensor([[0., .75 * mass, .25 * mass], [0., .3, .1]], requires_grad=True)
    each = torch.rand(3, 4, requires_grad=True)
    torch.testing.assert_close(shares(aux)[0], torch.tensor([0., .75, .25]) * (mass > 0), atol=1e-3, rtol=0)
    vectors(aux, each).square().sum().backward()
    assert aux.grad.isfinite().all() and each.grad.isfinite().all() and aux.grad[1].abs().min() > 0
    assert bool(aux.grad[0].any()) == (mass > 1e-19) and each.grad[1:].abs().min() > 0

# ---- the whole

SMALL = ['method=compressed', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'save_every=2', 'train.iterations=6',
         'train.warmup=2', 'train.batch=8', 'selectors=[oracle]', 'experts.n_experts=6', 'experts.rank=2']
@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with one whole run, and one that was killed and went on."
    here = tmp_path_factory.mktemp('compressed')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        whole_and_killed(SMALL)
    return here

def test_a_killed_run_ends_as_if_nothing_had_happened(runs): ends_alike(runs)

def test_vectors_are_frozen_with_their_expert(runs):
    result, model = load_result(runs/'whole'), load(runs/'whole').model
    assert len(result.fixed) and result.config['experts']['mix'] == 'main_and_aux'
    for moe in model.moes:
        names = [n for n, _ in moe.experts[0].named_parameters()]
        assert {'into', 'inner'} <= set(names) and moe.frozen.sum() > 0

def test_it_is_shared_and_answers_alike(runs):
    model, x = load(runs/'whole').model, torch.randn(2, 3, 32, 32)
    again = load(save(model, runs/'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
