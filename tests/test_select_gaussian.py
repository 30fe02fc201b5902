import numpy as np, pytest, torch
from moe_merge_nb.select.gaussian import Gaussian


def test_quantile_of_own_held_out_images_is_accepted():
    g = torch.Generator().manual_seed(0)
    a, b, far = (torch.randn(500, 8, generator=g) + m for m in (0, 6, 40))
    s = Gaussian(quantile=.9, held_out=.5).fit(a).fit(b)
    for t, kept in enumerate(s.kept):
        assert .88 <= (s.scores(kept)[:, t] <= 1).float().mean() <= .92
    assert (s.select(a)[s.select(a) >= 0] == 0).all() and (s.select(b)[s.select(b) >= 0] == 1).all()
    assert (s.select(far) == -1).all() # above every threshold


def test_gaussian_distance_is_mahalanobis():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 3, generator=g) @ torch.tensor([[2., 0, 0], [1, 1, 0], [0, .5, .1]])).double()
    s = Gaussian(shrinkage=.25, own=.5).fit(x).fit(3*x)
    S1, S2 = (sc.numpy()/n for sc, n in zip(s.scatters, s.freedoms))
    fit, held = Gaussian().split(x)
    np.testing.assert_allclose(S1, np.cov(x[fit].T.numpy()))
    sigma = .5*(S1 + S2)/2 + .5*S1 # half pooled, half own
    sigma = .75*sigma + .25*np.diag(np.diag(sigma))
    r = (x[:5] - x[fit].mean(0)).numpy()
    by_hand = np.sqrt(np.einsum('ni,ij,nj->n', r, np.linalg.inv(sigma), r))
    np.testing.assert_allclose(s.distances(x[:5])[:, 0], by_hand, rtol=1e-5)


def test_a_restored_gaussian_is_the_same_to_the_last_bit():
    g = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(90, 6, generator=g) + m for m in (0, 2, 1))
    s = Gaussian(seed=3).fit(a, torch.arange(90) % 4)
    r = Gaussian(seed=3).restore(s.state())
    assert (r.scores(x) == s.scores(x)).all() and r.n_parameters == s.n_parameters
    assert (r.fit(b).scores(x) == s.fit(b).scores(x)).all()
    assert Gaussian().restore(Gaussian().state()).select(x).eq(-1).all()
