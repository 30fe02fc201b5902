import pytest, tempfile
from dataclasses import asdict
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.pack import pack, unpack
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.study.changes import change_of, defaults_of

def made(method='moe', seed=0, **config):
    "An invented run with these entries in its configuration."
    r = example_result('moe', seed)
    r.config.update(method=method, **config)
    return r


def test_changes_are_told_by_their_fields():
    changes = {'protect': {'merge.protect': True}, 'small': {'experts.n_experts': 11, 'experts.rank': 16}}
    of = lambda method='moe_merge', **config: change_of(made(method, **config), changes, defaults_of(METHODS))
    assert of() is None and of('moe', merge=None) is None
    assert of(merge={'protect': False, 'every': None}) is None
    assert of(merge={'protect': True}) == 'protect'
    assert of('moe', experts={'n_experts': 11}) == 'small' # rank 16 is the default
    with pytest.raises(ValueError, match="'merge.align': True.*none of the known"): of(merge={'align': True})
    with pytest.raises(ValueError, match='none of the known'): of(merge={'protect': True}, experts={'n_experts': 11})
    with pytest.raises(ValueError, match="method is 'mine'"): of('mine')


def test_nothing_is_a_value_too():
    own = {'warm': {'freeze.settle': .75, 'merge.every': 0, 'merge.align': False, 'merge.protect': False}}
    changes = {
        'unsettled': {'freeze.settle': None},
        'merging': {'merge.every': None, 'merge.protect': True},
        'aligned': {'merge.every': None, 'merge.align': True},
        'short': {'train.iterations': 60, 'train.warmup': 6},
        'brief': {'train.warmup': 6, 'train.iterations': 60},
    }
    of = lambda **config: change_of(made('warm', **config), changes, own)
    assert of() is None # not known
    assert of(freeze={'settle': .75}) is None # the default
    assert of(freeze={'settle': None}) == 'unsettled'
    assert of(merge={'align': None}) is None # no change makes it None: it was not stored
    assert of(train={'iterations': 60}) == 'short' # all that is known fits; of two names for one change, the first
    assert of(merge={'every': None, 'align': False, 'protect': True}) == 'merging'
    with pytest.raises(ValueError, match=r"could be any of \['merging', 'aligned'\]: store"): of(merge={'every': None})


def test_changes_survive_packing():
    whole = asdict(METHODS['moe_merge'])
    settings = {k: whole[k] for k in ('experts', 'train', 'freeze', 'merge')}
    merges = ({}, {'protect': True}, {'every': 10})
    some = [made('moe_merge', seed=s, **{**settings, 'merge': settings['merge'] | m}) for s, m in enumerate(merges)]
    fields = ('merge.protect', 'merge.every', 'train.lr', 'train.betas')
    with tempfile.TemporaryDirectory() as d: packed = unpack(pack(some, f'{d}/runs.csv.gz', fields))
    changes = {'protect': {'merge.protect': True}, 'often': {'merge.every': 10}}
    for runs in (some, packed):
        assert [change_of(r, changes, defaults_of(METHODS)) for r in runs] == [None, 'protect', 'often']
