"""A run forgets a task: which numbers change, by which loss, and that what is left is a run like any other."""
import copy
import math
import sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from moe_merge_nb.learn.results import after, only_last, three
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run import cli
from moe_merge_nb.run.afterwards import predict_with
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.extending import extend
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import again
from moe_merge_nb.run.figures import beside_stored, tell
from moe_merge_nb.run.runs import load_all
from moe_merge_nb.run.share import load
from moe_merge_nb.run.unlearning import unlearn
from moe_merge_nb.strategies.forget import forget, forgetting, n_held
from moe_merge_nb.strategies.unlearn import (
    LOSSES, Forget, Place, Unlearn, affinities, anchor, ascent, npo, place_of, ranked)
from moe_merge_nb.streams.tasks import Stream, toy_stream
from toys import toy_model

STREAM = toy_stream(2)
FEW = dict(held=24, batch=8, steps=2, stop=0.)
SMALL = [
    'method=moe_merge', 'stream=toy', 'stream.n_tasks=2', 'model=random', 'train.iterations=40', 'train.warmup=2',
    'train.batch=8', 'experts.n_experts=6', 'experts.rank=2', 'selectors=[oracle,gaussian]', 'train.lr=0.02']
HOW = dict(target='all', held=24, batch=8, steps=30, lr=.02)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with a finished run of two toy tasks."
    d = tmp_path_factory.mktemp('unlearn')
    job(composed(*SMALL), d/'run', progress=False)
    return d

@pytest.fixture
def forgotten(folder):
    "What a few steps make of the run."
    shared = load(folder/'run')
    before = copy.deepcopy(shared.model.moes.state_dict())
    def few(target, **how):
        how = Unlearn(target=target, **{**FEW, **how})
        said = forget(shared.model, shared.tokenizer, STREAM, STREAM.names[1], how, progress=False)
        return before, shared.model, said
    return few

def changed(before, model):
    "Names of the tensors that are no longer what they were."
    return {k for k, w in model.moes.state_dict().items() if not torch.equal(w, before[k])}


# ---- which expert

def test_affinity_is_the_mean_gate_in_every_block_of_the_image_tower():
    model, _ = toy_model()
    x, seen = torch.randn(5, 3, 32, 32), []
    s = affinities(model, x, 1)
    with torch.no_grad(): model.encode_image(x, 1, seen.append)
    assert [*s] == [('image', r.block) for r in seen]
    for r in seen: torch.testing.assert_close(s['image', r.block], sum(r.gates) / 5)
    for row in s.values(): assert float(row.sum()) == pytest.approx(1, abs=1e-5)

def test_experts_are_ranked_over_all_blocks_together():
    s = {('image', 0): torch.tensor([.2, .8]), ('image', 1): torch.tensor([.9, .1])}
    assert [str(p) for p in ranked(s)] == ['image.1.0', 'image.0.1', 'image.0.0', 'image.1.1']
    s['image', 0] = torch.tensor([.1, .9])                                          # equal: nearest to the output
    assert ranked(s)[0] == Place('image', 1, 0)

def test_a_target_is_one_of_the_ranking_or_named():
    s = {('image', b): torch.tensor([.5 - b/10, .5 + b/10]) for b in range(3)}
    ranking = ranked(s)
    assert place_of('affine', ranking, 0) == ranking[0] and place_of('least', ranking, 0) == ranking[-1]
    assert place_of('last', ranking, 0).block == 2 and place_of('text.1.3', ranking, 0) == Place('text', 1, 3)
    assert len({place_of('random', ranking, seed) for seed in range(30)}) == 6
    assert place_of('all', ranking, 0) is None

@pytest.mark.parametrize('how, said', [
    (dict(loss='up'), "unlearn.loss is 'up'"), (dict(target='image.3'), "unlearn.target is 'image.3'"),
    (dict(stop=101), 'unlearn.stop is 101'), (dict(steps=0), 'unlearn.steps is 0'),
    (dict(beta=0), 'unlearn.beta is 0')])
def test_what_cannot_be_is_refused_by_name(how, said):
    with pytest.raises(ValueError, match=said): Unlearn(**how)

def test_what_is_not_there_is_refused_by_name():
    model, tokenizer = toy_model()
    def say(name, **how): forget(model, tokenizer, STREAM, name, Unlearn(**{**FEW, **how}), progress=False)
    with pytest.raises(ValueError, match="unlearn is 'Cats': choose one of"): say('Cats')
    with pytest.raises(ValueError, match="'image.9.0': there is no"): say(STREAM.names[0], target='image.9.0')
    with pytest.raises(ValueError, match='choose fewer, as in unlearn_options={held:'): say(STREAM.names[0], held=10**6)


# ---- by which loss

def test_the_losses_are_their_formulas():
    ce, before, beta = torch.tensor([.5, 2.]), torch.tensor([1., 1.]), .3
    assert float(ascent(ce, before, beta)) == pytest.approx(-1.25)
    ratio = [math.exp(-float(c)) / math.exp(-float(b)) for c, b in zip(ce, before)]         # pi / pi_before
    by_hand = [-2/beta * math.log(1 / (1 + r**beta)) for r in ratio]            # -2/beta log sigmoid(-beta log ratio)
    assert float(npo(ce, before, beta)) == pytest.approx(sum(by_hand) / 2, rel=1e-5)

def test_npo_goes_up_as_gradient_ascent_does_where_beta_is_small_and_stops_where_it_is_large():
    def slope(loss, ce, beta):
        ce = torch.tensor([ce], requires_grad=True)
        loss(ce, torch.tensor([1.]), beta).backward()
        return float(ce.grad)
    assert slope(npo, 1., 1e-3) == pytest.approx(slope(ascent, 1., 1e-3))
    assert abs(slope(npo, 20., 1.)) < 1e-6 and slope(ascent, 20., 1.) == -1

def test_the_anchor_is_zero_only_where_the_router_takes_that_expert_alone():
    h = torch.tensor([[0., 100., 0.]])
    assert float(anchor(h, 1)) == 0 and float(anchor(h, 0)) == pytest.approx(2)
    assert float(anchor(torch.zeros(4, 3), 1)) == pytest.approx(2/9 + 4/9)
    h = torch.tensor([[3., 2., -1.]], requires_grad=True)                       # not among the first two, and yet
    anchor(h, 2).backward()
    assert float(h.grad[0, 2]) < -1e-3

@pytest.mark.parametrize('loss, adds', [('ga', 0), ('gdiff', 1), ('npo', 1)])
def test_other_tasks_are_kept_where_the_loss_has_a_second_part(loss, adds):
    how = Unlearn(loss=loss, retain=3.)
    c = Forget(how, None, 0, torch.zeros(4), lambda: torch.tensor(1.))
    learner, ce = type('L', (), dict(batch=[1, 2])), torch.tensor([1., 2.])
    found = c.main_loss(learner, torch.zeros(2), torch.zeros(2), lambda reduction: ce)
    assert float(found - LOSSES[loss][0](ce, torch.zeros(2), .001)) == pytest.approx(3 * adds, abs=1e-3)


# ---- what changes

def test_one_expert_and_the_router_of_its_block_change_and_nothing_else(forgotten):
    before, model, said = forgotten('affine')
    tower, block, e = said['place'].split('.')
    i = next(i for i, m in enumerate(model.moes) if (m.tower, m.block) == (tower, int(block)))
    expert = {f'{i}.experts.{e}.{n}' for n in ('down.weight', 'down.bias', 'up.weight', 'up.bias')}
    assert changed(before, model) == expert | {f'{i}.routers.1.gate'}           # the noise of a router has no part
    d, r, E = 128, 2, 6
    assert said['numbers'] == 2*d*r + r + d + 2*d*E and said['steps'] == 2 and said['affinity'] > .1

def test_the_numbers_that_are_trained_are_as_many_as_they_should():
    model, tokenizer = toy_model(n_experts=22, rank=16)
    n = lambda parameters: sum(p.numel() for p in parameters)
    image = [m for m in model.moes if m.tower == 'image']
    assert sum(n(m.experts.parameters()) + n(m.routers[0].parameters()) for m in image) == 395_648
    callback = Forget(Unlearn(target='image.0.7'), Place('image', 0, 7), 0, torch.zeros(9), None)
    learner = forgetting(model, tokenizer, STREAM[0], 0, callback)
    assert n(learner.optimizer.param_groups[0]['params']) == 9872

@pytest.mark.parametrize('target, what', [('experts', 'experts'), ('routers', 'routers.1')])
def test_wide_targets_are_experts_or_the_routers_of_the_task(forgotten, target, what):
    before, model, _ = forgotten(target)
    assert changed(before, model) and all(what in k for k in changed(before, model))

def test_a_frozen_expert_is_opened_and_closed_again(forgotten):
    before, model, said = forgotten('affine')
    tower, block, e = said['place'].split('.')
    i = next(i for i, m in enumerate(model.moes) if (m.tower, m.block) == (tower, int(block)))
    assert before[f'{i}.frozen'][int(e)] and torch.equal(model.moes[i].frozen, before[f'{i}.frozen'])
    assert f'{i}.experts.{e}.up.bias' in changed(before, model)
    assert not any(p.requires_grad for p in model.parameters())

def test_without_a_step_nothing_changes(forgotten):
    before, model, said = forgotten('all', stop=100.)
    assert changed(before, model) == set() and said['steps'] == 0 and said['reached']
    assert said['before'] == said['held_out'] > 60

def test_it_ends_as_soon_as_one_answer_to_all_would_be_as_good(forgotten):
    _, model, said = forgotten('all', loss='ga', steps=30, lr=.02)
    labels = torch.tensor([STREAM[1].calibration[i][1] for i in range(24, 48)])
    assert said['goal'] == pytest.approx(100 * float(labels.bincount().max()) / 24)
    assert said['reached'] and said['held_out'] <= said['goal'] and 0 < said['steps'] < 30

def test_the_same_seed_forgets_in_the_same_way(folder):
    def once():
        shared = load(folder/'run')
        how = Unlearn(loss='gdiff', **FEW)
        forget(shared.model, shared.tokenizer, STREAM, STREAM.names[1], how, seed=3, progress=False)
        return shared.model.moes.state_dict()
    torch.manual_seed(5)
    one, two = once(), (torch.rand(7), once())[1]
    assert all(torch.equal(w, two[k]) for k, w in one.items())


# ---- a run like any other

@pytest.fixture(scope='module')
def without(folder):
    "The same run without its second task."
    return unlearn(folder/'run', STREAM.names[1], folder/'without', options=HOW, progress=False)

@pytest.fixture
def here(folder, without, monkeypatch):
    monkeypatch.chdir(folder)
    return folder

def test_it_is_kept_and_found_again_and_the_run_is_not_changed(here, capsys):
    run, r = load_result('run', adapters=True), load_result('without', adapters=True, selectors=True, checked=True)
    assert r.config['unlearned'][0]['task'] == STREAM.names[1] and r.config['unlearned'][0]['target'] == 'all'
    assert r.config['unlearned'][0]['run'] == run.config['config_hash'] != r.config['config_hash']
    [event] = r.events
    assert event['kind'] == 'unlearn' and event['steps'] > 0 and event['reached']
    right = {name: m.query('selector == "oracle"').set_index('task').accuracy[STREAM.names[1]] for name, m in
             dict(run=run.matrix.query('after == @STREAM.names[1]'), without=r.matrix).items()}
    assert right['run'] > 90 and right['without'] < 60
    assert any(not torch.equal(run.adapters[k], w) for k, w in r.adapters.items())
    found = unlearn('run', STREAM.names[1], 'without', options=HOW, progress=False)
    assert 'not run again' in capsys.readouterr().err
    pd.testing.assert_frame_equal(found.matrix, r.matrix)
    with pytest.raises(ValueError, match='another unlearned'):
        unlearn('run', STREAM.names[0], 'without', progress=False)

def test_its_only_row_is_the_last(here):
    r = load_result('without')
    assert only_last(r.config) and after(r.config) == [STREAM.names[1]]
    transfer, average, last = three(r, 'oracle')
    assert transfer != transfer and average != average and last == pytest.approx(
        r.matrix.query('selector == "oracle"').accuracy.mean())
    with pytest.raises(ValueError, match='made of a finished run'): again(r.config)

def test_it_is_loaded_shared_and_classifies(here):
    shared = load('without')
    assert shared.provenance['unlearned'][0]['task'] == STREAM.names[1]
    x, again_ = torch.randn(2, 3, 32, 32), load(shared.save('without.safetensors'))
    assert torch.equal(again_.model.encode_image(x, 1), shared.model.encode_image(x, 1))
    c = load_classifier('without')
    table = c([STREAM[0].test[0][0]], task=STREAM.names[0], progress=False)
    assert table['class'][0] in STREAM[0].classes

def test_it_is_predicted_with_extended_and_forgets_again(here):
    p = predict_with('without', 'averaged', progress=False)
    assert p.config['predicts']['run'] == load_result('without').config['config_hash']
    further = toy_stream(3)
    more = extend('without', Stream("toy", further.tasks[2:]), progress=False)
    assert len(more.config["tasks"]) == 3 and more.config['unlearned'][0]['task'] == STREAM.names[1]
    assert [*more.matrix.after.unique()] == more.config['tasks'][2:]
    both = unlearn('without', STREAM.names[0], options=HOW | dict(loss='ga'), progress=False)
    assert [u['task'] for u in both.config['unlearned']] == [STREAM.names[1], STREAM.names[0]]

def test_the_report_shows_it_as_a_row_of_its_own(here):
    runs, others = load_all([here/'run', here/'without'])
    assert [r.config['method'] for r in runs] == ['moe_merge']
    assert [r.config['method'] for r in others] == [f'moe_merge unlearn={STREAM.names[1]}']

@pytest.mark.filterwarnings('ignore:.*still right after')
def test_the_report_tells_two_ways_of_forgetting_one_task_apart(here):
    for target in ('experts', 'routers'):
        unlearn('run', STREAM.names[1], f'ways/{target}', options=FEW | dict(target=target), progress=False)
    runs, others = load_all([here/'run', here/'ways'])
    named = [f'moe_merge unlearn={STREAM.names[1]} unlearn_options.target={t}' for t in ('experts', 'routers')]
    assert [r.config['method'] for r in others] == named
    tell(runs, others, beside_stored(runs))                                        # and no two agree

def test_a_quarter_is_held_out_where_nothing_is_said():
    assert [n_held(n, None) for n in (2, 48, 1000)] == [1, 12, 64] and n_held(48, 24) == 24

@pytest.mark.filterwarnings('ignore:.*still right after 2 steps')
def test_the_command_says_what_it_did_and_refuses_what_the_run_has_said(here, monkeypatch, capsys):
    def typed(*arguments):
        monkeypatch.setattr(sys, 'argv', ['moe-merge', *arguments])
        try: cli.main()
        except SystemExit as e: return str(e.code), *capsys.readouterr()
        return '', *capsys.readouterr()
    options = 'unlearn_options={target:routers,held:24,batch:8,steps:2}'
    code, out, _ = typed(f'unlearn={STREAM.names[1]}', 'from=run', options)
    assert code == '' and 'oracle' in out and 'runs/unlearned/' in out
    assert f'{STREAM.names[1]} by routers' in out
    assert '2 steps: by its own routers, 100.0 % of held-out images were right' in out
    [made] = Path('runs/unlearned').iterdir()
    m = load_result(made).matrix.query(f'task == "{STREAM.names[1]}"').set_index('selector').accuracy
    assert f"by selector: oracle {m['oracle']:.1f} %, gaussian {m['gaussian']:.1f} %" in out
    assert load_result(made).config['unlearned'][0]['steps'] == 2
    assert 'rewrite is given with unlearn' in typed(f'unlearn={STREAM.names[1]}', 'from=run', 'rewrite=reap')[0]
    assert "unlearn is 'Cats'" in typed('unlearn=Cats', 'from=run')[0]
    assert [*Path('runs/unlearned').iterdir()] == [made]                            # a refusal leaves nothing
    assert 'say from=RUN' in typed(f'unlearn={STREAM.names[1]}')[0]
    assert 'train.lr is given with unlearn' in typed(f'unlearn={STREAM.names[1]}', 'from=run', 'train.lr=.1')[0]
    assert "no option 'rate'" in typed(f'unlearn={STREAM.names[1]}', 'from=run', 'unlearn_options={rate:1}')[0]
