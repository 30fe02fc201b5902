import pytest, torch
from torch.nn import functional as F
from moe_merge_nb.learn.views import View
from moe_merge_nb.baselines.rail import Dual, Primal, Rail

def clouds(n_tasks=3, n=40, d=6, classes=2, seed=0):
    "Unit features and global class numbers of some tasks."
    g = torch.Generator().manual_seed(seed)
    z = [F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1) for _ in range(n_tasks)]
    return [(x, torch.randint(classes, (n,), generator=g) + t*classes) for t, x in enumerate(z)]


def test_task_by_task_equals_all_at_once_and_the_papers_recursion():
    tasks, lam = clouds(), .1
    p = Primal(ridge=lam, width=30, seed=4)
    for t, (z, y) in enumerate(tasks): p.learn(z, y, 2*t + 2)
    z, y = (torch.cat(x) for x in zip(*tasks))
    phi, Y, eye = p.lift(z), F.one_hot(y).double(), lam*torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(p.W, torch.linalg.inv(phi.T @ phi + eye) @ phi.T @ Y, rtol=0, atol=1e-8)
    M, W = torch.linalg.inv(eye), torch.zeros(30, 6, dtype=torch.float64)
    for f, Yt in zip(phi.split(40), Y.split(40)):
        M = M - M @ f.T @ torch.linalg.inv(torch.eye(40) + f @ M @ f.T) @ f @ M
        W = W + M @ f.T @ (Yt - f @ W)
    torch.testing.assert_close(p.W, W, rtol=0, atol=1e-8)
    assert p.W.abs().max() > .1


def test_kernel_form_task_by_task_equals_all_at_once():
    import numpy as np
    tasks = clouds()
    k = Dual(ridge=.01, gamma=.7)
    for t, (z, y) in enumerate(tasks): k.learn(z, y, 2*t + 2)
    z, y = (torch.cat(x).numpy() for x in zip(*tasks))
    K = np.exp(-.7*((z[:, None] - z[None])**2).sum(-1))
    wanted = K @ np.linalg.solve(K + .01*np.eye(len(z)), np.eye(6)[y])
    np.testing.assert_allclose(k.scores(torch.tensor(z), slice(2, 5)), wanted[:, 2:5], atol=1e-8)


def test_a_linear_kernel_is_the_primal_form_without_its_layer():
    p, k = Primal(ridge=.3, width=0), Dual(ridge=.3, kernel='linear')
    for r in (p, k):
        for t, (z, y) in enumerate(clouds()): r.learn(z, y, 2*t + 2)
    new = clouds(1, seed=1)[0][0]
    torch.testing.assert_close(p.scores(new, slice(0, 6)), k.scores(new, slice(0, 6)), rtol=0, atol=1e-8)
    assert p.scores(new, slice(0, 6)).std() > .01


def test_the_primal_form_keeps_no_images_and_the_dual_keeps_all():
    for n in (40, 400):
        p, k = Primal(width=30), Dual()
        for r in (p, k):
            for t, (z, y) in enumerate(clouds(n=n)): r.learn(z, y, 2*t + 2)
        assert p.n_kept == 30*31//2 + 30*6 and sum(v.numel() for v in p.state().values()) == 30*30 + 30*6
        assert k.n_kept == 3*n*(6 + 6)
    with pytest.raises(ValueError, match='would keep 80 images, the limit is 50.*primal'):
        k = Dual(most=50)
        for t, (z, y) in enumerate(clouds(2)): k.learn(z, y, 2*t + 2)


def test_large_tasks_in_pieces():
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(5000, 4, generator=g, dtype=torch.float64), dim=-1)
    y = torch.randint(3, (5000,), generator=g)
    p = Primal(width=20)
    p.learn(z, y, 3)
    phi = p.lift(z)
    torch.testing.assert_close(p.G, phi.T @ phi)
    assert p.scores(z, slice(0, 3)).shape == (5000, 3)
    assert p.B.sum(0).argmax() == (phi.sum(1)[:, None]*F.one_hot(y)).sum(0).argmax()


def test_the_order_of_tasks_does_not_change_the_regression():
    def fitted(order, **options):
        "A head that has learned clouds in this order."
        h = Rail(**options)
        for t in order: h.fit(tasks[t][0], tasks[t][1] - 2*t, torch.zeros(2, 6))
        return h
    tasks, zero_shot = clouds(), torch.randn(40, 2)
    view = lambda i, t: View(i, i, tasks[t][0], lambda s: zero_shot)            # images of task t, learned as the i-th
    for options in (dict(width=30), dict(kind='kernel', ridge=.01)):
        a, b = fitted([0, 1, 2], **options), fitted([2, 0, 1], **options)
        for t in range(3):
            x, y = a.predict(view(t, t)), b.predict(view([2, 0, 1].index(t), t))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-8)
            assert (x.argmax(1) != zero_shot.argmax(1)).any()


def test_tasks_not_learned_stay_with_plain_clip():
    tasks, zero_shot = clouds(), torch.randn(40, 2)
    h, asked = Rail(width=30), View(2, -1, tasks[2][0], lambda s: {-1: zero_shot}[s])
    claimed = View(2, 0, tasks[2][0], lambda s: {-1: zero_shot}[s])             # by a selector
    for t in range(2):
        assert h.predict(asked) is zero_shot                                    # whatever has been learned
        assert h.predict(claimed) is zero_shot
        h.fit(tasks[t][0], tasks[t][1] - 2*t, torch.zeros(2, 6))
    left = View(0, -1, tasks[0][0], lambda s: zero_shot)                        # learned, but left to CLIP
    assert h.predict(left) is zero_shot


def test_among_all_classes_clip_decides_whether_an_image_is_of_a_learned_task():
    tasks, clip_says = clouds(), torch.randn(40, 6)
    h = Rail(width=30)
    for t in range(2): h.fit(tasks[t][0], tasks[t][1] - 2*t, torch.zeros(2, 6)) # classes 0 ... 3 of 6
    z = tasks[1][0]
    view = lambda s: View(None, s, z, lambda s: clip_says)
    scores = lambda n: h.regression.scores(h.embedding(z), slice(0, n))
    seen, p = clip_says.argmax(1) < 4, clip_says.double().softmax(1)
    assert seen.any() and not seen.all()
    found = h.predict(view(1))
    torch.testing.assert_close(found[~seen], p[~seen])
    torch.testing.assert_close(found[seen][:, :4], (.05*p[:, :4] + .95*scores(4))[seen])
    torch.testing.assert_close(found[seen][:, 4:], .05*p[seen][:, 4:])
    assert h.predict(view(-1)) is clip_says                                     # the selector leaves them to CLIP
    assert Rail().predict(view(0)) is clip_says                                 # nothing has been learned
    h.fit(tasks[2][0], tasks[2][1] - 4, torch.zeros(2, 6))
    torch.testing.assert_close(h.predict(view(0)), .05*p + .95*scores(6))
    one = Rail(width=30).fit(tasks[0][0], tasks[0][1], torch.zeros(2, 6))       # one task: both label spaces are one
    both = [one.predict(View(t, 0, z, lambda s: clip_says[:, :2])) for t in (0, None)]
    assert torch.equal(*both)


def test_counts_among_all_classes_are_those_of_a_loop_over_images():
    from moe_merge_nb.layer.adapt import AdaptedCLIP
    from moe_merge_nb.clip.backbone import load_clip
    from moe_merge_nb.learn.evaluate import evaluate
    from moe_merge_nb.learn.features import class_embeddings
    from moe_merge_nb.select.select import Latest, dataset_features
    from moe_merge_nb.streams.tasks import toy_stream
    clip, tokenizer = load_clip('toy', 'random')
    net, toys = AdaptedCLIP(clip, n_experts=0).eval(), toy_stream(3)
    h, latest, n_wrong = Rail(width=64), Latest(), 0
    for t in toys.tasks[:2]:
        h.fit(*dataset_features(clip, t.train), class_embeddings(net, tokenizer, t))
        latest.fit(None)
    known = dict(selectors={'none': latest}, after='circles', predict=h.predict, classes=('task', 'all'))
    rows = evaluate(net, tokenizer, toys, **known, progress=False).matrix
    texts = torch.cat([class_embeddings(net, tokenizer, t) for t in toys]) # (9, d)
    for i, t in enumerate(toys):
        features, labels = dataset_features(clip, t.test)
        z, right = h.embedding(features), 0
        for k in range(len(labels)):
            p = (net.logit_scale.exp()*z[k].float() @ texts.T).double().softmax(0)
            mixed = .05*p + .95*F.pad(h.regression.scores(z[k:k + 1], slice(0, 6))[0], (0, 3))
            if p.argmax() < 6: p = mixed                                        # CLIP: of a learned task
            right += int(p.argmax() == 3*i + labels[k])
        found = rows[(rows.selector == 'none all') & (rows.task == t.name)].accuracy.item()
        assert found == pytest.approx(100*right/len(labels)), t.name
        n_wrong += len(labels) - right
    assert 0 < n_wrong < 72


def test_fusion_is_a_mixture_of_probabilities_and_scores_of_the_tasks_own_classes():
    (z, y), zero_shot = clouds(1)[0], torch.randn(40, 2)
    def mixed(beta, learned=z, asked=z):
        h = Rail(width=30, fusion=beta).fit(learned, y, torch.zeros(2, 6))
        return h.predict(View(0, 0, asked, lambda s: zero_shot))
    zero, half, one = (mixed(b) for b in (0., .5, 1.))
    torch.testing.assert_close(zero, zero_shot.double().softmax(1))
    torch.testing.assert_close(half, (zero + one)/2)
    long = torch.cat([3*z, 100*torch.randn(40, 5).double()], 1)                 # other lengths, and features behind
    torch.testing.assert_close(mixed(1., long, long), one)


def test_a_restored_head_predicts_and_learns_as_the_first_would_have():
    tasks, zero_shot = clouds(), torch.randn(40, 2)
    for options in (dict(width=30), dict(kind='kernel')):
        h, r = Rail(**options), Rail(**options)
        for t in range(2): h.fit(tasks[t][0], tasks[t][1] - 2*t, torch.zeros(2, 6))
        r.restore(h.state())
        for x in (h, r): x.fit(tasks[2][0], tasks[2][1] - 4, torch.zeros(2, 6))
        for t in range(3):
            view = View(t, t, tasks[t][0], lambda s: zero_shot)
            assert torch.equal(h.predict(view), r.predict(view))
        assert Rail(**options).restore(Rail(**options).state()).predict(view) is zero_shot


def test_settings_and_labels_are_checked():
    assert Rail().regression.ridge == .1 and Rail('kernel').regression.ridge == .001
    assert Rail('kernel', ridge=2).regression.ridge == 2
    wrong = [
        (dict(kind='dual'), "kind is 'dual'"),
        (dict(kernel='poly'), "choose one of .'linear', 'rbf'"),
        (dict(ridge=0), 'ridge is 0'),
        (dict(gamma=-1), 'gamma is -1'),
        (dict(fusion=2), 'fusion is 2'),
        (dict(width=-3), 'width is -3'),
    ]
    for options, what in wrong:
        with pytest.raises(ValueError, match=what): Rail(**options)
    with pytest.raises(ValueError, match='0 to 3, but the task has 3 classes'):
        Rail(width=9).fit(torch.randn(4, 6), torch.arange(4), torch.zeros(3, 6))
