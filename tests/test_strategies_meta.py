"""Meta-distillation: one step without labels, episodes without the own teacher, and the strategy made of both."""
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from toys import toy_model
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.views import View, routed
from moe_merge_nb.select.select import Oracle
from moe_merge_nb.strategies.left_out import Domain, references
from moe_merge_nb.strategies.meta import (
    Aggregator, Episodes, MetaDMoE, Seen, Student, directions, distance, meta_train, one_step, outer_loss, scores)
from moe_merge_nb.streams.tasks import Stream, toy_stream

D, T, HOW = 16, 3, Episodes(lr=1e-2, episodes=6)
STREAM = toy_stream(3, n_train=40, n_test=12)
TWO = Stream('two', STREAM.tasks[:2])

def seen(seed=0, n=48, dtype=torch.float32):
    "Random images of a task."
    g = torch.Generator().manual_seed(seed)
    def some(*shape): return torch.randn(*shape, generator=g).to(dtype)
    texts, labels = F.normalize(some(4, D), dim=1), torch.randint(4, (n,), generator=g)
    return Seen(directions(some(n, D)), directions(some(n, T, D)), labels, texts)

def both(dtype=torch.float32):
    "A student and an aggregator, neither of which is silent."
    torch.manual_seed(0)
    student, aggregator = Student(D, 6).to(dtype), Aggregator(D, 4).to(dtype).eval()
    torch.nn.init.normal_(student.up.weight, std=.2)
    return student, aggregator

def theta_of(student): return dict(student.named_parameters())

def same(a, b): return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# ---- one step

def test_a_direction_has_length_sqrt_d():
    torch.testing.assert_close(directions(torch.randn(5, 3, 49)).norm(dim=-1), torch.full((5, 3), 7.))

def test_a_student_is_plain_clip_before_it_has_learned():
    s, z = seen(), Student(D)
    assert torch.equal(z(s.plain), s.plain)
    torch.testing.assert_close(scores(z, theta_of(z), s.plain, s.texts), F.normalize(s.plain, dim=1) @ s.texts.T)

def test_a_rate_of_0_leaves_the_student_and_a_small_one_brings_it_nearer():
    (student, aggregator), s = both(), seen()
    theta, t = theta_of(student), aggregator(s.teachers).detach()
    assert all(torch.equal(w, theta[k]) for k, w in one_step(student, theta, s.plain, t, 0.).items())
    far = [distance(student, one_step(student, theta, s.plain, t, a), s.plain, t).item() for a in (0., .01, .1, 1.)]
    assert far == sorted(far, reverse=True) and len(set(far)) == 4

def test_the_step_is_gradient_descent_on_the_mean_square():
    (student, aggregator), s = both(), seen()
    theta, t = theta_of(student), aggregator(s.teachers).detach()
    (student(s.plain) - t).square().mean().backward()
    for name, w in one_step(student, theta, s.plain, t, .3).items():
        torch.testing.assert_close(w, theta[name] - .3*theta[name].grad)

@pytest.mark.parametrize('part', ['student', 'aggregator'])
def test_the_outer_gradient_is_that_of_finite_differences(part):
    student, aggregator = both(torch.float64)
    s, q = seen(1, 24, torch.float64), seen(2, 16, torch.float64)
    def loss(): return outer_loss(student, aggregator, s, q, rate=.5, scale=5.)
    loss().backward()
    module, generator = dict(student=student, aggregator=aggregator)[part], torch.Generator().manual_seed(0)
    for w in module.parameters():
        along = torch.randn(w.shape, generator=generator, dtype=w.dtype)
        with torch.no_grad():
            w.add_(1e-5*along)
            up = loss().item()
            w.sub_(2e-5*along)
            down = loss().item()
            w.add_(1e-5*along)
        wanted, found = (up - down)/2e-5, (w.grad*along).sum().item()
        assert abs(wanted - found) < 1e-5*abs(wanted) + 1e-9

def test_teachers_have_no_order_and_may_be_fewer():
    (_, aggregator), s = both(), seen()
    torch.testing.assert_close(aggregator(s.teachers), aggregator(s.teachers[:, [2, 0, 1]]), rtol=1e-5, atol=1e-5)
    assert aggregator(s.without(1).teachers).shape == (48, D)
    assert torch.equal(s.without(1).teachers, s.teachers[:, [0, 2]])


# ---- episodes

def changed(domains, j, teacher):
    "The same, but one teacher says something else about one task."
    teachers = domains[j].teachers.clone()
    teachers[:, teacher] = directions(torch.ones(D))
    return domains | {j: domains[j]._replace(teachers=teachers)}

def test_an_episode_does_not_see_its_own_teacher():
    domains = {j: seen(j) for j in range(T)}
    train = lambda d, how=HOW, **k: meta_train(d, how, 20., progress=False, **k)
    plain = train(domains)
    assert same(plain, train(changed(domains, 1, 1))) and not same(plain, train(changed(domains, 1, 2)))
    unmasked = replace(HOW, unmasked=True)
    assert not same(train(domains, unmasked), train(changed(domains, 1, 1), unmasked))

def test_a_teacher_that_is_left_out_is_not_seen_at_all():
    domains = {j: seen(j) for j in (0, 1)}
    train = lambda d: meta_train(d, HOW, 20., left_out=(2,), progress=False)
    assert same(train(domains), train(changed(changed(domains, 0, 2), 1, 2)))

def test_training_learns_and_is_the_same_again():
    domains = {j: seen(j) for j in range(T)}
    one, two = (meta_train(domains, HOW, 20., seed=4, progress=False) for _ in range(2))
    assert same(one, two) and not same(one, meta_train(domains, HOW, 20., seed=5, progress=False))
    assert one['student'].up.weight.any() and not any(p.requires_grad for p in one.parameters())

def test_references_are_by_hand():
    s = seen()._replace(labels=torch.arange(48) % 4)
    sure = F.one_hot(s.labels, 4).float()
    odd, some = .9*sure.roll(1, 1), torch.arange(48)[:, None] < 12
    routed_by = torch.stack([sure, odd, torch.where(some, sure, odd)])
    found = references(Domain(s, s, routed_by, sure.roll(2, 1)), 0)
    assert found['its own router'] == 100 and found['zero-shot'] == 0
    assert found['best other router (by labels)'] == 25 and found['mean of the other routers'] == 25


# ---- the strategy

@pytest.fixture(scope='module')
def toy():
    "Model, tokenizer and a fitted strategy; the third task is not learned."
    model, tokenizer = toy_model()
    stream = Stream('two', tuple(replace(t, test=range(12)) for t in TWO.tasks)) # no test image is there
    return model, tokenizer, MetaDMoE(episodes=4, images=40).fit(model, tokenizer, stream, progress=False)

def view(s, n=7, columns=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, w = torch.randn(4, n, 128, generator=g), F.normalize(torch.randn(5, 128, generator=g), dim=1)
    how = dict(embed=lambda s: z[s], classes=lambda s: w)
    return View(0, s, torch.zeros(n, 8), lambda s: torch.full((n, 5), float(s)), columns=columns, **how)

def test_what_was_learned_goes_to_its_routers(toy):
    assert torch.equal(toy[2](view(1)), routed(view(1)))

def test_what_was_not_learned_gets_a_step(toy):
    strategy, v = toy[2], view(-1)
    student, theta = strategy.learned['student'], theta_of(strategy.learned['student'])
    t = strategy.learned['aggregator'](directions(torch.stack([v.embed(0), v.embed(1)], 1)))
    theta = one_step(student, theta, directions(v.embed(-1)), t, strategy.rate)
    with torch.no_grad(): found = strategy(v)
    torch.testing.assert_close(found, scores(student, theta, directions(v.embed(-1)), v.classes(-1)))
    copies = strategy(view(-1, columns=torch.tensor([0, 1, 0, 2, 1])))
    torch.testing.assert_close(copies[:, 0], found[:, [0, 2]].amax(1))

def test_it_is_restored_from_its_state(toy):
    strategy = toy[2]
    assert all(isinstance(v, torch.Tensor) for v in strategy.state().values())
    again = MetaDMoE(episodes=4, images=40).restore(strategy.state())
    assert torch.equal(again(view(-1)), strategy(view(-1)))

def test_it_costs_a_pass_of_every_teacher_where_no_task_fits(toy):
    model, tokenizer, strategy = toy
    oracle = Oracle()
    oracle.n_tasks = 2
    how = dict(selectors={'oracle': oracle}, after='circles', classes=('task', 'all'), progress=False)
    plain = evaluate(model, tokenizer, STREAM, **how)
    found = evaluate(model, tokenizer, STREAM, predict=strategy, **how)
    assert found.passes['images'] == plain.passes['images'] + 2*12
    old, new = (e.matrix.query('task in @TWO.names').accuracy.tolist() for e in (plain, found))
    assert old == new

def test_what_it_cannot_do_is_refused(toy):
    model, tokenizer, _ = toy
    with pytest.raises(ValueError, match='needs two learned tasks or more'):
        MetaDMoE().fit(model, tokenizer, Stream('one', STREAM.tasks[:1]))
    with pytest.raises(ValueError, match='nothing is learned yet'): MetaDMoE()(view(-1))
    with pytest.raises(ValueError, match='rate is -1: choose 0 or more'): MetaDMoE(rate=-1)
    with pytest.raises(ValueError, match='a whole number, 40 or more'): MetaDMoE(images=3)
