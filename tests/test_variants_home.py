"""HoME: its expert, its table, its second gate; and the whole from the command line, killed and gone on with."""
from types import SimpleNamespace
import pandas as pd
import pytest
import torch
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.experts import EXPERTS, algebra_of
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import MIXES, mix_loop
from moe_merge_nb.layer.moe import MoE, Route
from moe_merge_nb.layer.router import ROUTERS, top_k_gates
from moe_merge_nb.learn.checks import check
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.run.share import load, save
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.variants import home
from moe_merge_nb.variants.home import Hierarchy, HomeRouter, NormSwish, held_out, measure_scale
from moe_merge_nb.variants.home import mix_home, open_only, own_experts, self_gates
from toys import ends_alike, toy_model, whole_and_killed

PARTS = dict(expert='norm_swish', router='home', mix='home')


def loud(**how):
    "A HoME expert with random output weights, in double precision."
    torch.manual_seed(0)
    e = NormSwish(32, 16, scale=1., **how).double().eval()
    torch.nn.init.normal_(e.up.weight)
    return e

# ---- the expert

def test_the_names_mean_its_parts():
    settings = Experts(**PARTS)
    assert settings.part('expert') is NormSwish and settings.part('router') is HomeRouter
    assert settings.part('mix') is mix_home
    for registry, name in ((EXPERTS, 'norm_swish'), (ROUTERS, 'home'), (MIXES, 'home')):
        assert isinstance(registry[name], str)                      # the layer does not import it

def test_it_begins_as_the_zero_function_with_a_feature_gate_of_exactly_one():
    e, v = NormSwish(32, 16).eval(), torch.randn(5, 7, 32)
    assert torch.equal(e.feature_gate(v), torch.ones(5, 7, 32)) and torch.equal(e(v), torch.zeros_like(v))

def test_it_is_its_formula():
    e, v = loud(), torch.randn(9, 32).double()
    torch.nn.init.normal_(e.A.weight)
    gate = 2 / (1 + torch.exp(-(v @ e.B.weight.T @ e.A.weight.T)))
    u = (v * gate) @ e.down.weight.T + e.down.bias
    u = (u - u.mean(1, keepdim=True)) / (u.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(e(v), (u / (1 + torch.exp(-u))) @ e.up.weight.T + e.up.bias)

def test_its_hidden_units_have_mean_0_and_variance_1_before_swish():
    e, v = loud(), torch.randn(300, 32).double()
    u = e.norm(e.down(v))
    assert u.mean(1).abs().max() < 1e-6 and (u.var(1, unbiased=False) - 1).abs().max() < 1e-3

def test_how_strongly_it_reads_does_not_matter():
    e, v = loud(), torch.randn(200, 32).double()
    before = e(v)
    e.down.weight.data *= 5
    e.down.bias.data *= 5
    assert (e(v) - before).abs().max() < 1e-3 and before.abs().max() > 1

def test_it_has_no_algebra_so_rules_that_look_inside_refuse_it():
    assert algebra_of(NormSwish(8, 2)) is None
    with pytest.raises(ValueError, match='merge.align.*no algebra'):
        check(method('home', merge=Merge(align=True)), toy_stream(2))

# ---- the table

@pytest.mark.parametrize('index, own', [(0, [4]), (3, [7]), (4, [])])
def test_half_is_shared_and_the_rest_is_dealt_out_in_turn(index, own):
    assert Hierarchy().experts_of('any', index, 8) == ([0, 1, 2, 3], own)

def test_a_table_names_own_experts_and_all_others_are_shared():
    h = Hierarchy(table={'a': [0, 3], 'b': [5]})
    assert h.experts_of('a', 0, 6) == ([1, 2, 4], [0, 3]) and h.experts_of('c', 2, 6) == ([1, 2, 4], [])

def test_more_experts_later_do_not_change_who_is_shared():
    assert Hierarchy().experts_of('any', 4, 12, 8) == ([0, 1, 2, 3], [8])

@pytest.mark.parametrize('wrong, said', [
    (dict(shared=1.5), 'baseline.shared'), (dict(own=-1), 'baseline.own'), (dict(table=[1]), 'baseline.table'),
    (dict(table={'a': 3}), "baseline.table..a..* is 3"), (dict(table={'a': [-1]}), "baseline.table..a...0. is -1")])
def test_impossible_settings_are_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=said): Hierarchy(**wrong)

def learner(name='a', index=0, **parts):
    "What a callback is told of before the first task of a tiny model."
    model, _ = toy_model(index + 1, **{**PARTS, **parts})
    return SimpleNamespace(model=model, index=index, task=SimpleNamespace(name=name), events=[], iteration=7)

@pytest.mark.parametrize('h, parts, said', [
    (Hierarchy(table={'a': [9]}), {}, r'\[9\], but there are 4: choose 0 ... 3'),
    (Hierarchy(shared=0., own=0), {}, 'would see none of 4 experts'),
    (Hierarchy(), dict(router='noisy', mix='once'), 'no self_gate: choose experts.router=home')])
def test_a_task_that_cannot_be_served_is_refused(h, parts, said):
    with pytest.raises(ValueError, match=said): h.before_task(learner(**parts))

def test_a_task_without_own_experts_is_told_so():
    said = "'a' has no experts of its own, only 2 shared"
    with pytest.warns(UserWarning, match=said): Hierarchy().before_task(learner(index=2))

def test_own_experts_are_frozen_when_their_task_ends():
    told = learner()
    Hierarchy().before_task(told)
    Hierarchy().after_task(told)
    assert all(moe.frozen.tolist() == [False, False, True, False] for moe in told.model.moes)
    assert len(told.events) == len(told.model.moes) and told.events[0]['experts'] == [2]

# ---- the gates

def layer(own=(3, 4), shared=(0, 1), **how):
    "A layer of six random experts, one task that sees `shared` and `own`, and sequences."
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=6, rank=3, **{**PARTS, **how})).double().eval()
    moe.add_task()
    moe.double()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    open_only(moe.routers[0], list(shared), list(own))
    return moe, torch.randn(5, 4, 8).double()

def test_the_mixture_is_the_sum_over_all_experts_plus_that_over_its_own():
    moe, x = layer()
    router = moe.routers[0]
    g = top_k_gates((x[:, 0] @ router.gate).masked_fill(router.closed, -torch.inf), 2)
    s = (x[:, 0] @ router.self_gate.gate)[:, [3, 4]].softmax(1)
    by_hand = mix_loop(x, g, moe.experts) + sum(s[:, i, None, None] * moe.experts[e](x) for i, e in enumerate((3, 4)))
    torch.testing.assert_close(mix_home(x, Route(moe, 0), moe.experts), by_hand)

def test_closed_experts_have_gates_of_exactly_0_and_no_gradient():
    moe, x = layer(top_k=4)
    mix_home(x, Route(moe, 0), moe.experts).square().sum().backward()
    router, closed = moe.routers[0], [2, 5]
    assert (Route(moe, 0)(x)[:, closed] == 0).all()
    assert (router.gate.grad[:, closed] == 0).all() and (router.self_gate.gate.grad[:, [0, 1, 2, 5]] == 0).all()
    assert all(p.grad is None for e in closed for p in moe.experts[e].parameters())
    assert router.self_gate.gate.grad[:, [3, 4]].abs().min() > 0

def test_the_self_gate_of_one_expert_is_a_sigmoid_with_a_gradient():
    logits = torch.tensor([[-torch.inf, 0.], [-torch.inf, 2.]], requires_grad=True)
    s = self_gates(logits)
    torch.testing.assert_close(s, torch.tensor([[0., .5], [0., 1 / (1 + torch.exp(torch.tensor(-2.)))]]))
    s.sum().backward()
    assert logits.grad[:, 1].min() > .1 and logits.grad.isfinite().all()

def test_several_own_experts_share_1_and_none_is_0():
    shut = -torch.inf
    s = self_gates(torch.tensor([[1., shut, 1., shut], [shut, shut, shut, shut]]))
    assert torch.equal(s, torch.tensor([[.5, 0., .5, 0.], [0., 0., 0., 0.]]))

def test_usage_is_counted_once_and_other_gates_leave_the_self_gate():
    moe, x = layer()
    told = []
    mix_home(x, Route(moe, 0, told.append), moe.experts)
    assert len(told) == 1
    nothing = mix_home(x, Route(moe, 0, over=lambda moe, logits: torch.zeros_like(logits)), moe.experts)
    own = self_gates(moe.routers[0].self_gate(x[:, 0]))
    torch.testing.assert_close(nothing, mix_loop(x, own, moe.experts))

def test_prompts_are_encoded_as_in_training():
    model, tokenizer = toy_model(**PARTS)
    tokens = tokenizer(['a photo of a dog', 'a photo of a cat', 'a dog'])
    torch.testing.assert_close(model.encode_prompts(tokens, 1), model.encode_text(tokens, 1), rtol=1e-4, atol=1e-5)

# ---- the choice of the factor

def test_the_recipe_has_the_factor_that_was_chosen():
    assert method('home').experts.scale == 1.5 and method('moe').experts.scale == .1

def test_settings_are_chosen_without_test_images():
    [task] = toy_stream(1)
    n, cut = len(task.train), held_out(task, .75)
    for what in ('images', 'labels'):
        every = getattr(task.train, what)
        assert torch.equal(getattr(cut.train, what), every[:n*3//4])
        assert torch.equal(getattr(cut.test, what), every[n*3//4:])
    assert cut.calibration is cut.train and cut.classes == task.classes

def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path, [task] = tmp_path/'rows.csv', toy_stream(1)
    monkeypatch.setattr(home, 'mini', lambda seed, order: [task])
    path.write_text(f'method,domain,iterations,scale,lr,data_seed,accuracy\nhome,{task.name},2,0.1,0.01,50,-1.0\n')
    measure_scale(path, domain=task.name, iterations=2, tried=[(.1, 1e-2), (1.5, 1e-2)], data_seeds=[50])
    rows = pd.read_csv(path)
    assert rows.scale.tolist() == [.1, 1.5] and rows.accuracy[0] == -1 < rows.accuracy[1] # the first was not run

# ---- the whole

SMALL = ['method=home', 'stream=toy', 'stream.n_tasks=2', 'model=toy', 'save_every=2', 'train.iterations=6',
         'train.warmup=2', 'train.batch=8', 'selectors=[oracle]', 'experts.n_experts=6', 'experts.rank=2',
         '+experts.options.expert.gate_rank=2']
@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with one whole run, and one that was killed and went on."
    here = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        whole_and_killed(SMALL)
    return here

def test_a_killed_run_ends_as_if_nothing_had_happened(runs): ends_alike(runs)

def test_every_task_keeps_to_its_experts(runs):
    usage, model = load_result(runs/'whole').usage, load(runs/'whole').model
    tasks = list(dict.fromkeys(usage.after))
    for index, task in enumerate(tasks):
        seen = {0, 1, 2, 3 + index}
        assert set(usage[(usage.after == task) & (usage['count'] > 0)].expert) <= seen
        assert all(own_experts(moe.routers[index]) == [3 + index] and moe.frozen[3 + index] for moe in model.moes)

def test_it_is_shared_and_answers_alike(runs):
    model, x = load(runs/'whole').model, torch.randn(2, 3, 32, 32)
    again = load(save(model, runs/'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
