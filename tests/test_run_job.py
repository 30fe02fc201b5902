import pytest
from dataclasses import replace
from moe_merge_nb.learn.results import *
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run.config import CHANGES
from moe_merge_nb.baselines.methods import METHODS
from moe_merge_nb.run.job import *
from moe_merge_nb.run.options import composed
tiny = (
    'stream=toy',
    'stream.n_tasks=2',
    'model=toy',
    'train.iterations=4',
    'train.warmup=1',
    'train.batch=8',
    'experts.n_experts=4',
    'experts.rank=2',
    'selectors=[oracle,gaussian]')


def test_the_published_number_of_parameters():
    import open_clip, torch
    from types import SimpleNamespace
    from moe_merge_nb.baselines.methods import method
    vitb16 = open_clip.create_model('ViT-B-16-quickgelu', pretrained=None, device='meta') # shapes without numbers
    tasks = [SimpleNamespace(classes=range(100), train=range(6000))] * 11
    found = parameters(method('moe_merge', 'mtil'), vitb16, tasks)
    assert (found['experts'], found['routers']) == (43_625_472, 7_434_240)
    assert found['selector oracle'] == 0 < found['selector gaussian']


def test_what_is_in_no_dictionary_is_found_where_python_finds_it():
    own = ('stream=moe_merge_nb.streams.tasks.toy_stream', 'method=moe_merge_nb.baselines.methods.a_method_of_ones_own',
           'data_seed=3')
    from unittest.mock import patch
    from moe_merge_nb.baselines import methods
    mine = replace(METHODS['moe_merge'], name='mine', merge=replace(METHODS['moe_merge'].merge, every=7))
    with patch.object(methods, 'a_method_of_ones_own', mine, create=True):
        cfg = composed(*own)
        assert made(cfg.stream).info['data_seed'] == 3
        assert method_of(cfg).merge.every == 7
        assert method_of(cfg).name == 'mine'


def test_a_change_sets_the_fields_it_names():
    cfg = composed('method=moe_merge', 'change=protect')
    assert cfg.change == 'protect' and method_of(cfg).merge == replace(METHODS['moe_merge'].merge, protect=True)
    assert method_of(composed('method=moe', 'change=freeze_bug')).freeze.freeze_bug
    assert method_of(composed('method=moe', 'change=top1')).experts.top_k == 1
    warm = 'merging_unfrozen', 'start_copy', 'start_pairs', 'start_fresh'
    for name, settings in CHANGES.items(): # each can be made by the method it is for
        base = 'moe_warm' if name in warm else 'moe_merge'
        method_of(composed(f'method={base}', f'change={name}'))


def test_impossible_values_are_refused_with_field_and_limit():
    refused = {
        'experts.top_k=23': 'top_k is 23, but there are 22 experts',
        'experts.rank=0': 'rank is 0',
        'merge.every=0': 'merge.every is 0',
        'train.batch=0': 'train.batch is 0',
        'merge.combine=medain': 'medain',
        'selectors=[psychic]': 'psychic'}
    for bad, says in refused.items():
        with pytest.raises(UsageError, match=says): method_of(composed('method=moe_merge', bad))
    for bad in ('order=3', 'data_seed=-1', 'shots=0'):
        with pytest.raises(UsageError, match=bad.split('=')[1]): job(composed(bad), progress=False)
    toy = 'method=moe_merge', 'stream=toy', 'model=toy'
    odd = 'seed=abc seed=-1 seed=1.5 threads=0 train=5 merge=5 freeze=5 freeze.n=-1 selectors=gaussian'
    for bad in odd.split():
        with pytest.raises(UsageError, match=bad.split('=')[0]): job(composed(*toy, bad), progress=False)
    with pytest.raises(UsageError, match='toy_stream|n_tasks'): job(composed(*toy, 'stream.n_tasks=0'), progress=False)


def test_the_command_runs_what_python_runs():
    from moe_merge_nb.clip.backbone import load_clip
    from moe_merge_nb.learn.loop import run
    from moe_merge_nb.streams.tasks import toy_stream
    cfg = composed(*tiny)
    a, b = job(cfg, progress=False), run(toy_stream(2), method_of(cfg), 0, load_clip('toy', 'random'), progress=False)
    assert a.matrix.equals(b.matrix) and a.config['data_seed'] == 0


def test_a_finished_run_is_not_done_again_and_another_one_is_not_overwritten():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        a, again = job(composed(*tiny), d, False), job(composed(*tiny), d, False)
        with pytest.raises(UsageError, match='another seed .0, not 1.'): job(composed(*tiny, 'seed=1'), d, False)
        assert load_result(d).timings == a.timings == again.timings


def test_what_changes_no_number_changes_no_run():
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        a = job(composed(*tiny, 'cache_mb=0', 'save_every=1'), d, False)
        assert job(composed(*tiny, 'save_every=null'), d, False).timings == a.timings
    for bad in ('cache_mb=-1', 'cache_mb=x', 'save_every=0', 'save_every=1.5'):
        with pytest.raises(UsageError, match=bad.split('=')[0]): job(composed(*tiny, bad), progress=False)


def test_a_directory_in_use_is_refused_in_one_line():
    import tempfile
    from filelock import FileLock
    with tempfile.TemporaryDirectory() as d, FileLock(f'{d}/.lock'):
        with pytest.raises(UsageError, match='is in use by another process'): job(composed(*tiny), d, False)


def test_a_tracker_is_fed_when_asked_for_and_unknown_ones_are_refused():
    import tempfile
    from pathlib import Path
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    with tempfile.TemporaryDirectory() as d:
        job(composed(*tiny, 'method=moe', 'track=tensorboard'), d, False)
        events = EventAccumulator(str(next(Path(d).rglob('events.out*')).parent)).Reload()
        assert {'train/loss', 'accuracy/oracle/circles', 'spent/memory_mb'} <= set(events.Tags()['scalars'])
        assert [e.step for e in events.Scalars('train/loss')] == [4, 8]
        job(composed(*tiny), f'{d}/without', False)
        assert not list(Path(d, 'without').rglob('events.out*'))
    for bad, says in {'track=tensorbored': "track is 'tensorbored'", 'device=gpu': "device is 'gpu'"}.items():
        with pytest.raises(UsageError, match=says): job(composed(*tiny, bad), progress=False)
