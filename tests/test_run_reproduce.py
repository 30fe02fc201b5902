import pytest
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.results import *
from moe_merge_nb.learn.saved import *
from moe_merge_nb.run.reproduce import *


def test_a_result_is_made_again_from_its_stored_configuration_alone():
    import json, tempfile
    from moe_merge_nb.run.job import job
    from moe_merge_nb.run.options import composed
    tiny = (
        'stream=toy',
        'stream.n_tasks=2',
        'model=toy',
        'stream.n_train=24',
        'stream.n_test=8',
        'train.iterations=4',
        'train.warmup=1',
        'train.batch=8',
        'seed=5',
        'data_seed=1')
    moe = 'experts.n_experts=4', 'experts.rank=2', 'merge.every=3', 'selectors=[oracle,gaussian]'
    said = '''version commit dirty config_hash seed data_seed device torch numpy open_clip_torch python machine threads
        seconds'''.split()
    for options in (
        ('method=moe_merge', *moe),
        ('method=icarl', 'selectors=[none]'),
        ('method=rail', 'classes=[task,all]'),
    ):
        with tempfile.TemporaryDirectory() as d:
            job(composed(*tiny, *options), d, False)
            stored = load_result(d)
        result = again(stored.config)
        assert result.matrix.astype(str).equals(stored.matrix.astype(str)), options
        assert result.config['config_hash'] == stored.config['config_hash'], options
        assert set(said) <= stored.config.keys()


def test_another_backbone_or_a_foreign_stream_is_refused():
    from moe_merge_nb.run.job import job
    from moe_merge_nb.run.options import composed
    options = 'stream=toy', 'stream.n_tasks=1', 'model=toy', 'method=zero_shot'
    config = job(composed(*options), progress=False).config
    with pytest.raises(ValueError, match='the weights of this backbone have the hash'):
        again(config, load_clip('toy', 'random', seed=1))
    with pytest.raises(ValueError, match="stream is 'mine'"): again({**config, 'stream': 'mine'})
