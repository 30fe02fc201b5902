"""Every file counts: those of a finished run, the cached images, the weights beside shared adapters; and every program
that worked on a run is written down."""
import json
import os
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from moe_merge_nb.clip.backbone import load_clip, pico, write_weights
from moe_merge_nb.learn import loop, plan
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.recover import CHECKPOINT, NotThisRun
from moe_merge_nb.learn.saved import ADAPTERS, SUMS, load_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.share import load
from moe_merge_nb.safe.known import file_digest
from moe_merge_nb.streams import mini as module
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import toy_stream

STREAM = toy_stream(2, 3, 12, 6)
METHOD = Method('moe', experts=dict(n_experts=4, rank=2), train=Train(iterations=2, batch=4, warmup=1))

def learned(directory, seed=0, backbone=None, **how):
    "A run that takes a moment."
    backbone = backbone or load_clip('toy', 'random')
    return run(STREAM, METHOD, seed, backbone, directory, progress=False, accelerator=Accelerator(cpu=True), **how)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Finished runs of two seeds; the first was made with a file of weights."
    d = tmp_path_factory.mktemp('runs')
    write_weights(pico(0), d/'w.safetensors')
    named = dict(model='pico', pretrained=str(d/'w.safetensors'))
    learned(d/'zero', 0, load_clip('pico', d/'w.safetensors'), config=named)
    learned(d/'one', 1)
    return d

@pytest.fixture
def copied(runs, tmp_path):
    "The run of seed 1, to be damaged."
    return Path(shutil.copytree(runs/'one', tmp_path/'run'))


# ---- a finished run

def flipped(path):
    "Flip a bit in the middle of the file."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)

DAMAGES = {
    'deleted': lambda d, runs: (d/ADAPTERS).unlink(),
    'flipped': lambda d, runs: flipped(d/ADAPTERS),
    'of another seed': lambda d, runs: shutil.copy(runs/'zero'/ADAPTERS, d),
    'a flipped table': lambda d, runs: flipped(d/'usage.csv'),
    'a deleted table': lambda d, runs: (d/'fixed.csv').unlink(),
    'deleted digests': lambda d, runs: (d/SUMS).unlink(),
    'no digests': lambda d, runs: (d/SUMS).write_text('{}')}
NAMES = dict.fromkeys(DAMAGES, ADAPTERS) | {
    'a flipped table': 'usage.csv',
    'a deleted table': 'fixed.csv',
    'deleted digests': SUMS,
    'no digests': 'config.json'}

@pytest.mark.parametrize('how', DAMAGES)
def test_a_run_with_a_damaged_file_is_not_finished_and_the_file_is_named(how, copied, runs):
    DAMAGES[how](copied, runs)
    with pytest.raises(NotThisRun, match=f'{NAMES[how]}.*(run it again|remove the directory)'): learned(copied, 1)
    kept = {p.name for p in copied.iterdir()}
    assert kept <= {p.name for p in (runs/'one').iterdir()}, 'nothing is written'

LINE = (
    'stream=toy', 'stream.n_tasks=2', 'model=toy', 'method=moe', 'train.iterations=2', 'train.warmup=1',
    'train.batch=4', 'experts.n_experts=4', 'experts.rank=2', 'selectors=[oracle]', 'device=cpu')

@pytest.fixture(scope='module')
def commanded(tmp_path_factory):
    "Finished runs of two seeds, as the command line makes them."
    d = tmp_path_factory.mktemp('commanded')
    for seed, name in enumerate(('zero', 'one')): job(composed(*LINE, f'seed={seed}'), str(d/name), False)
    return d

@pytest.mark.parametrize('how', DAMAGES)
def test_nor_does_the_command_take_it_for_finished(how, commanded, tmp_path):
    d = Path(shutil.copytree(commanded/'one', tmp_path/'run'))
    DAMAGES[how](d, commanded)
    with pytest.raises(UsageError, match=NAMES[how]): job(composed(*LINE, 'seed=1'), str(d), False)

def test_adapters_that_were_asked_for_are_there_or_named(copied, runs):
    assert set(load_result(copied, adapters=True).adapters) == set(load_file(copied/ADAPTERS))
    (copied/ADAPTERS).unlink()
    assert len(load_result(copied).matrix) == 4, 'the tables can be read without them'
    with pytest.raises(FileNotFoundError, match=f'{ADAPTERS} is missing.*run it again'):
        load_result(copied, adapters=True)
    (copied/SUMS).unlink()
    with pytest.warns(UserWarning, match=f'{SUMS} is missing.*cannot be told'), pytest.raises(FileNotFoundError):
        load_result(copied, adapters=True)

def test_an_intact_run_is_recognised_said_and_left_without_checkpoints(copied, capsys):
    first = load_result(copied)
    (copied/CHECKPOINT).write_bytes(b'left by a process that was killed')
    again = learned(copied, 1)
    assert again.config == first.config and not (copied/CHECKPOINT).exists()
    said = capsys.readouterr().err.splitlines()
    assert said == [f"finished on {first.config['finished']}, not run again: {copied}"]

def test_a_run_of_an_earlier_version_is_read_but_not_taken_for_this_one(copied):
    path, sums = copied/'config.json', copied/SUMS
    config = json.loads(path.read_text())
    del config['data_sha256']
    path.write_text(json.dumps(config))
    digests = json.loads(sums.read_text()) | {'config.json': file_digest(path)}
    sums.write_text(json.dumps(digests))
    assert len(load_result(copied).matrix) == 4
    with pytest.raises(NotThisRun, match='an earlier version, which did not write down what images it saw'):
        learned(copied, 1)


# ---- programs

class Stop(Callback):
    "Fails in the second task."
    def before_task(self, learner):
        if learner.index == 1: raise MemoryError

def test_a_resumed_run_names_all_programs_that_worked_on_it(tmp_path):
    real, torch_versions = plan.provenance, iter(['8', '8', '9'])
    def version(device): return {**real(device), 'torch': next(torch_versions)}
    with patch.object(plan, 'provenance', version), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with patch.object(loop, 'Progress', lambda bar: Stop()):
            for _ in range(2):
                with pytest.raises(MemoryError): learned(tmp_path)
        r = learned(tmp_path)
    assert [p['torch'] for p in r.config['programs']] == ['8', '9'] and r.config['torch'] == '9'
    assert load_result(tmp_path).config['programs'] == r.config['programs']
    assert {'version', 'commit', 'threads', 'device', 'processes'} < set(r.config['programs'][0])

def test_an_undisturbed_run_names_its_one_program(runs):
    config = load_result(runs/'one').config
    [program] = config['programs']
    assert program == {k: config[k] for k in program}


# ---- the model beside adapters

def test_adapters_of_a_run_are_not_loaded_onto_other_weights(runs):
    said = load_result(runs/'zero').config['backbone_sha256']
    assert load(runs/'zero').model.n_tasks == 2
    with pytest.raises(ValueError, match=f'another backbone.*{said[:12]}.*, not '):
        load(runs/'zero', load_clip('toy', 'random', 1))
    original = (runs/'w.safetensors').read_bytes()
    write_weights(pico(1), runs/'w.safetensors')
    try:
        with pytest.raises(ValueError, match=f"another backbone: .*w.safetensors.*{said[:12]}.*, not "):
            load(runs/'zero')
    finally: (runs/'w.safetensors').write_bytes(original)


# ---- the cached stream

SMALL = dict(n_train=20, n_test=2)

def same(a, b):
    "Are all images and labels of two streams the same?"
    pairs = [(x, y) for s, t in zip(a, b) for x, y in ((s.train, t.train), (s.test, t.test))]
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)

def test_a_flipped_bit_anywhere_in_the_cached_images_is_drawn_again(tmp_path):
    first = mini(cache=tmp_path, **SMALL)
    [file] = tmp_path.iterdir()
    whole, drawn = file.read_bytes(), module._draw_all(0, (20, 2))
    rng = np.random.default_rng(0)
    places = [0, 8, *rng.integers(8, 4000, 5), *rng.integers(4000, len(whole), 4), len(whole) - 1]
    with patch.object(module, '_draw_all', lambda *args: drawn):
        for at in places:
            data = bytearray(whole)
            data[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(data)
            with pytest.warns(UserWarning, match='mini-v2.*It is drawn again'): again = mini(cache=tmp_path, **SMALL)
            assert same(again, first) and file.stat().st_size == len(whole), at

def test_labels_of_another_shape_or_arrays_of_another_stream_are_not_taken(tmp_path):
    first = mini(cache=tmp_path, **SMALL)
    [file] = tmp_path.iterdir()
    for name, tensors in dict(junk={'a': torch.ones(2)}, half=dict(list(load_file(file).items())[:4])).items():
        save_file(tensors, file)
        with pytest.warns(UserWarning, match='It is drawn again'): again = mini(cache=tmp_path, **SMALL)
        assert same(again, first), name

def test_the_cache_keeps_the_files_that_were_used_last(tmp_path):
    for i in range(12):
        (tmp_path/f'mini-v1-{i}.npz').write_text('old')
        os.utime(tmp_path/f'mini-v1-{i}.npz', (i, i))
    (tmp_path/'other').write_text('not ours')
    mini(cache=tmp_path, **SMALL)
    left = {p.name for p in tmp_path.iterdir()}
    old = {f'mini-v1-{i}.npz' for i in range(5, 12)}
    assert left == old | {'other', 'mini-v2-seed0-20-2.safetensors'} and len(old) + 1 == module.KEPT
