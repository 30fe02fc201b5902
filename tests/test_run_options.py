import pytest
from hydra.errors import ConfigCompositionException
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.run.options import *


def test_unknown_keys_are_refused():
    for bad in ('experts.ranks=8', 'merge.evry=3', 'method=moe_merged', 'sede=1'):
        with pytest.raises(ConfigCompositionException): composed(bad)
    with pytest.raises(ConfigCompositionException): composed('method=moe', 'merge.every=3')
    with pytest.raises(ConfigCompositionException): composed('stream=toy', 'order=2')
