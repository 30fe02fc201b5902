import pytest, torch
from moe_merge_nb.select.autoencoder import AutoEncoder


def test_a_restored_auto_encoder_is_the_same_to_the_last_bit():
    g = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(60, 10, generator=g) + m for m in (0, 3, 1))
    s = AutoEncoder(hidden=7, steps=20).fit(a)
    r = AutoEncoder(hidden=7, steps=20).restore(s.state())
    assert (r.scores(x) == s.scores(x)).all() and r.n_parameters == s.n_parameters
    assert (r.fit(b).scores(x) == s.fit(b).scores(x)).all()
    assert all(isinstance(t, torch.Tensor) for net in s.state()['nets'] for t in net.values())
