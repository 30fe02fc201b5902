"""A router without gradients: k-means, one expert for each cluster, least squares; and a method that trains with it."""
from dataclasses import replace
import pytest
import torch
from moe_merge_nb.baselines.methods import PROTOCOLS, method
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.layer.tried import try_out
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.merge.rule import Merge, check_rule
from moe_merge_nb.run.share import load, save
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.variants import mixer
from moe_merge_nb.variants.given import Given, all_best_gates, assigned, first_centers, k_means, least_squares, refit
from moe_merge_nb.variants.mixer import Force, MixER, family, measure_mixer, purity
from toys import SMALL, ends_alike, toy_model, whole_and_killed

GIVEN = dict(n_experts=3, rank=2, top_k=1, router='given', gate='all_best')


@pytest.fixture
def clear():
    "Three clusters of 20 contexts that nobody could confuse, losses that name an expert for each, a generator."
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(3).repeat_interleave(20)
    x = 5 * torch.eye(3, 6)[truth] + .3 * torch.randn(60, 6, generator=g)
    best = torch.tensor([2, 0, 1])[truth]
    L = 1 - torch.nn.functional.one_hot(best, 3) + .1 * torch.rand(60, 3, generator=g)
    return x, L, best, g

def test_each_cluster_gets_its_expert_and_the_router_says_so(clear):
    x, L, best, g = clear
    router = Given(6, 3)
    centers = refit(router, x, L, x[[0, 20, 40]], 'points', generator=g)
    assert centers.shape == (3, 6) and router(x).argmax(1).equal(best)
    assert all_best_gates(router(x)).equal(torch.nn.functional.one_hot(best, 3).float())

def test_every_expert_is_taken_once_the_first_cluster_choosing_first():
    cluster = torch.tensor([0, 0, 0, 1, 1, 2])
    L = torch.tensor([[.1, .5, .9]] * 3 + [[.1, .2, .3]] * 2 + [[.1, .1, .8]])
    assert assigned(cluster, L).tolist() == [0, 1, 2]
    assert assigned(cluster, L.flip(1)).tolist() == [2, 1, 0]
    for _ in range(20): assert sorted(assigned(torch.arange(8) % 4, torch.rand(8, 4)).tolist()) == [0, 1, 2, 3]

def test_a_median_does_not_mind_a_few_wrong_losses():
    L = torch.tensor([[0., 1]] * 3 + [[100., 0]] * 2 + [[1., 0]] * 5)
    assert assigned(torch.tensor([0] * 5 + [1] * 5), L).tolist() == [0, 1]

def test_an_aborted_refit_leaves_the_router_as_it_was(clear):
    x, L, _, g = clear
    router = Given(6, 3)
    torch.nn.init.normal_(router.W)
    before = router.W.clone()
    far = torch.stack([x[0], x[20], torch.full((6,), 99.)])
    assert refit(router, x, L, far, 'points', generator=g) is None and router.W.equal(before)

def test_clusters_that_come_to_rest_in_the_last_iteration_only_do_not_count(clear):
    x = clear[0]
    needed = next(n for n in range(1, 20) if k_means(x, x[[0, 20, 40]], iterations=n))
    assert k_means(x, x[[0, 20, 40]], iterations=needed - 1) is None
    cluster, centers = k_means(x, x[[0, 20, 40]])
    for c in range(3): torch.testing.assert_close(centers[c], x[cluster == c].mean(0))

def test_starts_near_the_origin_fail_more_often_than_starts_at_points(clear):
    x, _, _, g = clear
    failed = {s: sum(k_means(x, first_centers(x, 3, s, g)) is None for _ in range(100)) for s in ('origin', 'points')}
    assert failed['origin'] > 2 * failed['points'] and first_centers(x, 3, 'origin', g).abs().max() <= 1e-3

def test_least_squares_are_least(clear):
    x, _, best, g = clear
    W = least_squares(x, best, 3, g)
    X, Y = torch.cat([x, torch.ones(60, 1)], 1), torch.nn.functional.one_hot(best, 3).float()
    error = (X @ W - Y).square().sum()
    for _ in range(10): assert (X @ (W + .01 * torch.randn(7, 3, generator=g)) - Y).square().sum() > error

def test_without_weights_all_experts_run_and_are_summed():
    moe = MoE('image', 0, 8, Experts(**GIVEN)).eval()
    moe.add_task()
    for e in moe.experts: torch.nn.init.normal_(e.up.weight)
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(mixture(moe, x, 0), sum(e(x) for e in moe.experts))
    logits = torch.tensor([[1., 1, 0], [0, 2, 1], [1, 1 + 1e-7, -torch.inf]], requires_grad=True)
    gates = all_best_gates(logits)
    assert gates.tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]] and not gates.requires_grad
    moe.routers[0].closed[1] = True
    torch.testing.assert_close(mixture(moe, x, 0), moe.experts[0](x) + moe.experts[2](x))

def test_forced_is_what_the_expert_alone_says():
    model, _ = toy_model(**GIVEN)
    moe, x = model.moes[0], torch.randn(4, 5, 128)
    torch.testing.assert_close(mixture(moe, x, 0, over=Force(2)), moe.experts[2](x))
    assert Force(2) == Force(2) and hash(Force(2)) == hash(Force(2)) != hash(Force(1))

def trained(callback, iterations=4, **fields):
    "A toy task, trained."
    model, tokenizer = toy_model(n_tasks=1, **GIVEN)
    known = dict(callbacks=[callback], **fields)
    return model, train_task(model, toy_stream(1)[0], 0, tokenizer, Train(iterations=iterations, batch=8), **known)

def test_no_gradient_reaches_the_routers_and_nothing_random_is_taken():
    model, learner = trained(MixER(every=2, images=16))
    held = {id(p) for group in learner.optimizer.param_groups for p in group['params']}
    for moe in model.moes:
        assert not list(moe.routers.parameters()) and id(moe.routers[0].W) not in held
        assert any(p.grad is not None for p in moe.experts.parameters())
    refits = [e for e in learner.events if e['kind'] == 'refit']
    assert sorted({e['iteration'] for e in refits}) == [0, 2, 4] and {e['tower'] for e in refits} == {'image'}
    for moe in model.moes:
        worked = [not e['aborted'] for e in refits if e['block'] == moe.block] if moe.tower == 'image' else [False]
        assert bool(moe.routers[0].W.any()) == any(worked)
    assert any(not e['aborted'] for e in refits)

def test_settings_are_checked_and_more_experts_than_images_refused():
    with pytest.raises(ValueError, match='baseline.start'): MixER(start='anywhere')
    with pytest.raises(ValueError, match='baseline.every'): MixER(every=-1)
    with pytest.raises(ValueError, match='baseline.images is 2 for 3 experts'): trained(MixER(images=2))

def test_merging_refuses_its_columns_by_name():
    with pytest.raises(ValueError, match="merge.router is 'mean' with experts.router='given'"):
        check_rule(Merge(router='mean'), Experts(**GIVEN))
    check_rule(Merge(), Experts(**GIVEN))

def test_purity_and_families():
    part = torch.tensor([0, 0, 1, 1, 2, 3])
    assert purity(torch.tensor([1, 1, 0, 0, 0, 2]), part) == 5/6 and purity(torch.zeros(6).long(), part) == 2/6
    loose, close = (family(name, 50) for name in ('four domains', 'one domain'))
    assert all(len(t.classes) == 20 == len(set(t.train.labels.tolist())) for t in (loose, close))
    assert all((t.train.labels // 5).bincount().max() <= 160 for t in (loose, close))

def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path/'rows.csv'
    monkeypatch.setattr(mixer, 'WAYS', dict(list(mixer.WAYS.items())[:1]))
    monkeypatch.setattr(mixer, 'family', lambda name, seed: replace(toy_stream(1)[0], name=name))
    measure_mixer(path, data_seeds=[50], iterations=1)
    rows = path.read_text().splitlines()
    path.write_text('\n'.join(rows[:2]) + '\n')
    measure_mixer(path, data_seeds=[50], iterations=1)
    assert path.read_text().splitlines() == rows and len(rows) == 3

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_it_is_trained_killed_resumed_and_shared(here):
    how = ['method=mixer', 'experts.n_experts=3', 'baseline.every=3', 'baseline.images=12', 'selectors=[oracle]']
    whole_and_killed([*SMALL, *how])
    ends_alike()
    model, x = load('whole').model, torch.randn(2, 3, 32, 32)
    assert any(m.routers[1].W.any() for m in model.moes)
    assert {e['kind'] for e in load_result('whole').events} == {'refit'}
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))

def test_the_recipe():
    found = method('mixer')
    assert (found.experts.router, found.experts.gate, found.freeze, found.merge) == ('given', 'all_best', None, None)
    assert found.train == PROTOCOLS['mini'].train
    try_out(found.experts)
