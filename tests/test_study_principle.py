import numpy as np, pandas as pd, pytest, torch
from moe_merge_nb.layer.experts import Expert, read
from moe_merge_nb.layer.experts import balance, neurons
from moe_merge_nb.study.principle import *


def test_cka_forgets_rotation_and_scale_and_cosine_does_not():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(300, 6, generator=g)
    q = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    assert cka(a, 3 * a @ q + 1) == pytest.approx(1)
    assert cosine(a, 3 * a) == pytest.approx(1) and abs(cosine(a, a @ q)) < .9
    k = lambda m: (m - m.mean(0)) @ (m - m.mean(0)).T # by the definition with Gram matrices
    b = torch.randn(300, 4, generator=g) + a[:, :4]
    assert cka(a, b) == pytest.approx(float((k(a) * k(b)).sum() / (k(a).norm() * k(b).norm())), rel=1e-4)
    assert np.isnan(cka(a, torch.ones(300, 2)))


def test_reordered_neurons_are_found_and_cost_nothing_when_matched():
    g = torch.Generator().manual_seed(1)
    a = {k: torch.randn(v.shape, generator=g) for k, v in read(Expert(24, 8)).items()}
    order, inputs = torch.randperm(8, generator=g), torch.randn(200, 24, generator=g)
    reads = {k: a[k][order] for k in ('down.weight', 'down.bias')}
    b = {**a, **reads, 'up.weight': a['up.weight'][:, order]}
    like, wrong = likeness(a, b, inputs), errors(a, b, inputs)
    assert like['cosine'] == pytest.approx(1, abs=1e-5)
    assert like['weights matched'] == pytest.approx(1, abs=1e-5) and like['weights'] < .6
    assert wrong['error'] > 20 and wrong['error matched'] < .01 and wrong['error of one'] < .01
    c = {k: torch.randn(v.shape, generator=g) for k, v in a.items()}
    assert errors(a, c, inputs)['error matched'] > 20 # matching cannot help where there is nothing to match
    assert likeness(a, {k: 0 * v for k, v in c.items()}, inputs)['cosine'] == 0


def test_entropy_counts_classes():
    assert class_entropy(torch.zeros(9).long(), 4) == 0
    assert class_entropy(torch.arange(8) % 4, 4) == pytest.approx(1)
    assert class_entropy(torch.tensor([0, 0, 1, 1]), 4) == pytest.approx(.5)
    assert np.isnan(class_entropy(torch.zeros(0).long(), 4)) and np.isnan(class_entropy(torch.zeros(3).long(), 1))
    g, labels = torch.Generator(), torch.arange(200) % 10
    some = [chance_entropy(n, labels, 10, g.manual_seed(0)) for n in (2, 20, 200)]
    assert some[0] < some[1] < some[2] == pytest.approx(1)
