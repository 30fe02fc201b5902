"""Runs that differ in what decides their numbers are never shown as seeds of one thing."""
import os
from dataclasses import dataclass, replace
import pytest
from moe_merge_nb.baselines.methods import METHODS, method
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import describe
from moe_merge_nb.learn.pack import pack, unpack
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.job import UsageError, job, message_of
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.runs import load_all, load_runs
from moe_merge_nb.safe.known import stamp_of
from moe_merge_nb.streams.tasks import toy_stream


def example(seed=0, **config):
    r = example_result('moe_merge', seed)
    r.config |= dict(config_hash=f'{seed}{sorted(config.items())}'.encode().hex()[-64:], **config)
    return r

def named(runs): return sorted(r.config['method'] for r in runs)


# ---- packed

def test_a_packed_file_tells_settings_apart_as_their_directories_do(tmp_path):
    runs = [example(0, merge=dict(every=2)), example(1, merge=dict(every=4))]
    for i, r in enumerate(runs): save_result(r, tmp_path/'runs'/str(i))
    pack(runs, tmp_path/'q.csv')
    wanted = ['moe_merge merge.every=2', 'moe_merge merge.every=4']
    assert named(load_runs([tmp_path/'runs'])) == named(load_runs([tmp_path/'q.csv'])) == wanted

@pytest.mark.parametrize('config', [
    dict(sources={'r.f': 64*'0'}), dict(backbone_sha256=64*'0'), dict(predict='averaged'), dict(shots=5)])
def test_so_does_it_with_what_lies_behind_the_settings(tmp_path, config):
    other = {k: {'r.f': 64*'1'} if k == 'sources' else 64*'1' if k == 'backbone_sha256' else None for k in config}
    pack([example(0, **config), example(1, **other)], tmp_path/'q.csv')
    assert len(set(named(load_runs([tmp_path/'q.csv'])))) == 2

def test_files_packed_one_by_one_are_told_apart_too(tmp_path):
    for seed, every in ((0, 2), (1, 4)): pack([example(seed, merge=dict(every=every))], tmp_path/f'{seed}.csv')
    save_result(example(2, merge=dict(every=2)), tmp_path/'d')
    found = load_runs([tmp_path/'0.csv', tmp_path/'1.csv', tmp_path/'d'])
    assert named(found) == ['moe_merge merge.every=2', 'moe_merge merge.every=2', 'moe_merge merge.every=4']

def test_other_images_are_refused_across_packed_files(tmp_path):
    for seed in (0, 1): pack([example(seed, data_sha256=dict(Aircraft=64*str(seed)))], tmp_path/f'{seed}.csv')
    with pytest.raises(ValueError, match='different images under the same data seed'):
        load_runs([tmp_path/'0.csv', tmp_path/'1.csv'])

def test_a_run_beside_its_own_pack_is_one_run(tmp_path):
    r = example(0, merge=dict(every=2), sources={'r.f': 64*'0'})
    save_result(r, tmp_path/'d')
    pack([r], tmp_path/'q.csv')
    assert named(load_runs([tmp_path/'d', tmp_path/'q.csv'])) == ['moe_merge']

def test_two_runs_that_nothing_tells_apart_are_not_packed(tmp_path):
    with pytest.raises(ValueError, match='two of these runs agree in'): pack([example(0), example(0)], tmp_path/'q.csv')

def test_two_settings_of_one_seed_stay_two_runs(tmp_path):
    runs = [example(0, merge=dict(every=every)) for every in (2, 4)]
    back = unpack(pack(runs, tmp_path/'q.csv'))
    assert [len(r.matrix) for r in back] == [len(r.matrix) for r in runs]

def test_seeds_of_one_setting_stay_seeds(tmp_path):
    pack([example(seed, merge=dict(every=2)) for seed in range(3)], tmp_path/'q.csv')
    assert named(load_runs([tmp_path/'q.csv'])) == 3*['moe_merge']

@pytest.mark.parametrize('config', [dict(predicts=dict(run='a')), dict(unlearned=[dict(task='x', run='a')])])
def test_what_was_made_of_a_run_is_not_packed(tmp_path, config):
    with pytest.raises(ValueError, match='prediction by a finished run'):
        pack([example(0), example(1, **config)], tmp_path/'q.csv')


# ---- what is made of a run is named by the run

def made_of(r, **config):
    "Its last row, as a prediction or an unlearned run has it."
    last = r.config['tasks'][-1]
    return replace(r, matrix=r.matrix[r.matrix.after == last], config={**r.config, 'config_hash': 64*'f', **config})

@pytest.fixture
def two(tmp_path):
    "Runs a and b that differ in a setting."
    runs = {name: example(0, merge=dict(every=every)) for name, every in (('a', 2), ('b', 4))}
    for name, r in runs.items(): save_result(r, tmp_path/name)
    return tmp_path, runs

def test_an_unlearned_run_is_named_by_the_run_it_was(two):
    path, runs = two
    was = runs['b'].config['config_hash']
    save_result(made_of(runs['b'], unlearned=[dict(task='beta', run=was)]), path/'c')
    _, made = load_all([path])
    assert named(made) == ['moe_merge merge.every=4 unlearn=beta']

def test_a_prediction_by_a_run_that_is_not_there_says_so(two):
    path, runs = two
    save_result(made_of(runs['a'], predict='contrast', predicts=dict(run=64*'e')), path/'c')
    _, made = load_all([path])
    assert named(made) == ['moe_merge run=eeeeeeee predict=contrast']


# ---- callbacks of one's own

@dataclass
class Reversed(Callback):
    "Predicts the worst class."
    def predict(self, view, predict): return -predict(view)

class Plain(Callback):
    "No dataclass."

def small(**how):
    train = replace(METHODS['moe'].train, iterations=2, warmup=1, batch=8)
    return replace(method('moe'), train=train, selectors=('oracle',), **how)

def test_a_classifier_does_not_leave_out_how_a_method_predicts(tmp_path):
    how = dict(seed=0, backbone=load_clip('pico', 'random'), progress=False)
    how |= dict(directory=tmp_path, config=dict(model='pico', pretrained='random'))
    run(toy_stream(1), small(baseline=Reversed()), **how)
    with pytest.raises(ValueError, match='predicts by test_told_apart.Reversed, which a classifier does not ask'):
        load_classifier(tmp_path, device='cpu', backbone=load_clip('pico', 'random'))

def test_a_part_without_written_settings_is_refused_by_name():
    with pytest.raises(ValueError, match='baseline is a test_told_apart.Plain, which is no dataclass'):
        describe(toy_stream(1), small(baseline=Plain()), 0)


# ---- messages

def test_what_a_loading_process_says_is_one_line():
    text = ('Caught ValueError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n'
            '  File "x"\nValueError: a/b.png has changed since the run began\n')
    assert message_of(ValueError(text)) == 'a/b.png has changed since the run began'
    assert message_of(ValueError('a: b')) == 'a: b'

def test_a_missing_setting_is_named_as_it_is_given(tmp_path, monkeypatch):
    (tmp_path/'mm.py').write_text('from moe_merge_nb.clip.backbone import load_clip\ndef f(): return load_clip()\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match='image_size is missing: say image_size=VALUE'):
        job(composed('stream=folder', 'root=.', 'model=mm.f', 'method=zero_shot'))

def test_a_stamp_knows_the_device(tmp_path):
    (tmp_path/'x').write_text('x')
    assert stamp_of(tmp_path/'x').device == os.stat(tmp_path/'x').st_dev
