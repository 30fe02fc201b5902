import pytest, torch
from moe_merge_nb.select.accept import Fitted

class Mean(Fitted):
    "Distance to the mean of a task's images"
    learned = ('n_tasks', 'means', 'thresholds')
    def __init__(self, **options):
        super().__init__(**options)
        self.means, self.thresholds = [], torch.zeros(0)
    def fit(self, features, labels=None, texts=None):
        fit, held = self.split(features)
        mu = features[fit].mean(0)
        threshold = (features[held] - mu).norm(dim=1).quantile(self.quantile)
        self.means = [*self.means, mu]
        self.thresholds = torch.cat([self.thresholds, threshold[None]])
        self.n_tasks += 1
        return self
    def distances(self, features):
        return torch.stack([(features - mu).norm(dim=1) for mu in self.means], dim=1)


def test_the_quantile_of_own_images_is_accepted():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 5, generator=g), 3*torch.randn(4000, 5, generator=g) + 9
    for q in (.8, .95):
        s = Mean(quantile=q).fit(a).fit(b)
        for t, x in enumerate((a, b)): assert ((s.scores(x)[:, t] <= 1).float().mean() - q).abs() < .02


def test_a_restored_selector_goes_on_as_the_first_would_have():
    g = torch.Generator().manual_seed(0)
    a, b, x = torch.randn(50, 3, generator=g), torch.randn(50, 3, generator=g) + 2, 3*torch.randn(200, 3, generator=g)
    s = Mean(seed=5).fit(a)
    r = Mean(seed=5).restore(s.state())
    assert (r.scores(x) == s.scores(x)).all()
    assert (r.fit(b).scores(x) == s.fit(b).scores(x)).all() # the split of the next task too
    assert r.select(x).unique().tolist() == [-1, 0, 1]
    with pytest.raises(ValueError, match=r"holds \['n_tasks', 'nets'\]; a Mean needs"):
        Mean().restore(dict(n_tasks=1, nets=[]))


def test_nothing_learned_takes_no_part_and_wrong_options_are_refused():
    assert Mean().select(torch.zeros(3, 2)).tolist() == [-1]*3
    with pytest.raises(ValueError, match='quantile=98'): Mean(quantile=98)
    with pytest.raises(ValueError, match='most=0'): Mean(most=0)
    with pytest.raises(ValueError, match='2 training images'): Mean().fit(torch.zeros(2, 2))
