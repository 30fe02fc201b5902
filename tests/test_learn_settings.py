import pytest
from moe_merge_nb.learn.settings import *


def test_settings_of_another_kind_are_refused_by_field():
    nan, inf = float('nan'), float('inf')
    odd = dict(
        lr=[nan, inf, True, '0.1', None, [.1], {}, 10**400],
        batch=[1.5, '8', True, None],
        iterations=[inf, 1e3],
        warmup=[nan, 1.],
        weight_decay=[nan, inf, '0'],
        label_smoothing=[nan, False],
        workers=[True, .5, None],
        micro_batch=[2., nan],
        betas=[.9, (.9,), (.9, .9, .9), '99'],
        precision=[None, [], 16],
    )
    for name, values in odd.items():
        for value in values:
            with pytest.raises(ValueError, match=f'^train.{name} is .*: choose '): Train(**{name: value})
    for value in (nan, 0, True, 'a'):
        with pytest.raises(ValueError, match=r"^train.lr\['Cars'\] is .*: choose "):
            Train(lr={'Pets': .1, 'Cars': value})
    for value in (1, -.1, nan, 'a'):
        with pytest.raises(ValueError, match=r'^train.betas\[1\] is .*: choose '): Train(betas=(.9, value))
    assert Train(lr=1, weight_decay=0, betas=[0, .5]).lr == 1
