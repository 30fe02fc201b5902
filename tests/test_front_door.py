"""A command that cannot be obeyed ends in one line that names the setting; a job of a sweep that cannot, too, and the
others go on. `moe-merge` is called here in this process, as its script calls it."""
import json
import sys
from pathlib import Path
import pytest
import torch
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.run import cli, job as jobs_page
from moe_merge_nb.run.job import UsageError, job, method_of
from moe_merge_nb.run.jobs import distinct
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.share import load

TINY = ('stream=toy', 'stream.n_tasks=2', 'model=toy', 'train.batch=8', 'train.iterations=4')
FEW = (*TINY, 'experts.n_experts=4', 'experts.rank=2', 'selectors=[oracle]')

@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    "Exit code and both outputs of a command, in an empty working directory."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.delenv('HYDRA_FULL_ERROR', raising=False)
    def type_in(*arguments):
        monkeypatch.setattr(sys, 'argv', ['moe-merge', *arguments])
        code = said = None
        try: cli.main()
        except SystemExit as e: code, said = (1, e.code) if isinstance(e.code, str) else (e.code, '')
        finally: monkeypatch.delenv('HYDRA_FULL_ERROR', raising=False)
        out, err = capsys.readouterr()
        return code or 0, out, err + (said or '')
    return type_in

def configs(where):
    "What was run, by directory."
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(Path(where).rglob('config.json'))}


# ---- sweeps

def test_a_sweep_leaves_out_what_a_method_lacks_and_runs_equal_jobs_once(typed):
    line = '-m method=moe,moe_merge seed=0 merge.every=1,2 hydra.sweep.dir=sweep'.split()
    code, _, said = typed(*line, *FEW)
    assert code == 0 and said.count('merge.every is left out for method moe, which has no merge') == 1
    assert sorted((c['method'], (c['merge'] or {}).get('every')) for c in configs('sweep').values()) == [
        ('moe', None), ('moe_merge', 1), ('moe_merge', 2)]

def test_a_bad_job_says_so_in_one_line_and_the_others_go_on(typed):
    code, out, said = typed('-m', *FEW, 'experts.n_experts=0,3', 'hydra.sweep.dir=sweep')
    assert code == 1 and 'Traceback' not in said and said.endswith('1 of 2 jobs failed')
    [line] = [x for x in said.splitlines() if 'job 0 (' in x]
    assert 'experts.n_experts is 0: nothing would be trained' in line
    assert [c['experts']['n_experts'] for c in configs('sweep').values()] == [3] and 'Last' in out

def test_what_no_job_has_a_use_for_is_refused():
    with pytest.raises(UsageError, match='merge.every=2 is given, but method moe has no merge'):
        distinct([['method=moe', 'merge.every=2']])
    with pytest.raises(UsageError, match='change=protect is given, but method adapter has no merge'):
        distinct([['method=adapter', 'change=protect'], ['method=moe', 'change=protect']])
    jobs = [['method=moe', 'change=once'], ['method=moe_merge', 'change=once'], ['merge.until=.5']]
    assert distinct(jobs) == [['method=moe'], *jobs[1:]]


# ---- one line

REFUSED = {
    'stream=mini shots=abc': "shots is 'abc'",
    'stream=mini shots=1.5': 'shots is 1.5',
    'data_seed=-1': 'data_seed is -1',
    'train.batch=1000000000': 'train.batch is 1000000000: choose a whole number from 1 to',
    'train.batch=1e9': 'train.batch is 1000000000.0',
    'experts.rank=1000000000': 'experts.rank is 1000000000',
    'experts.n_experts=1000000000': 'experts.n_experts is 1000000000',
    'experts.rank=65536 experts.n_experts=65536': 'experts.n_experts is 65,536 and experts.rank 65,536: that takes',
    'stream.n_train=1000000000': 'stream.n_train is 1000000000',
    'threads=1000000000': 'threads is 1000000000',
    'train.workers=1000000000': 'train.workers is 1000000000',
    'selectors=[oracle,oracle]': "selectors is ['oracle', 'oracle']: name each once",
    'root=x': "root is 'x', but this stream has no folder",
    'order=[MNIST,XTD] stream=mini': "order is ['MNIST', 'XTD']",
}

@pytest.mark.parametrize('line', REFUSED)
def test_a_value_that_cannot_be_is_refused_by_name(line, monkeypatch):
    def trains(*args, **kwargs): raise AssertionError('it would have been trained')
    monkeypatch.setattr(jobs_page, 'run', trains)
    toy = () if 'mini' in line else TINY
    with pytest.raises(UsageError) as e: job(composed(*toy, *line.split()), progress=False)
    assert REFUSED[line] in str(e.value) and '\n' not in str(e.value)

def test_a_directory_that_is_a_file_or_cannot_be_written_is_one_line(typed, monkeypatch):
    Path('file').write_text('')
    code, _, said = typed(*FEW, 'hydra.run.dir=file')
    assert code == 1 and said == ('moe-merge: file: File exists; give access, or choose another directory: '
                                  'hydra.run.dir=FOLDER')
    code, _, said = typed(*FEW, 'hydra.run.dir=file/run')
    assert code == 1 and 'Not a directory; give access' in said and '\n' not in said
    def read_only(self, *args, **kwargs): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'mkdir', read_only)
    code, _, said = typed(*FEW)
    assert code == 1 and said.startswith('moe-merge: runs/moe_merge/') and 'Permission denied; give access' in said

def test_a_precision_that_accelerate_was_told_of_is_one_line(typed, monkeypatch):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    try: code, _, said = typed(*FEW)
    finally: AcceleratorState._reset_state(reset_partial_state=True)
    assert code == 1 and 'Traceback' not in said and said.endswith('train.precision=bf16')

NO_MEMORY = [MemoryError('Unable to allocate 8 TiB'), RuntimeError("can't allocate memory: 8 TB")]

@pytest.mark.parametrize('error', NO_MEMORY)
def test_memory_that_is_not_there_is_one_line_with_a_remedy(error, monkeypatch):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(jobs_page, 'run', fails)
    with pytest.raises(UsageError, match='there is not enough memory .*llocate.*choose fewer or smaller experts'):
        job(composed(*FEW), progress=False)

def test_an_error_that_nobody_can_mend_keeps_its_traceback(monkeypatch):
    def fails(*args, **kwargs): raise RuntimeError('a mistake of ours')
    monkeypatch.setattr(jobs_page, 'run', fails)
    with pytest.raises(RuntimeError, match='a mistake of ours'): job(composed(*FEW), progress=False)


# ---- what works

def test_a_tenth_of_the_iterations_is_warm_up_unless_said():
    assert Train().n_warmup == 100
    assert Train(iterations=10).n_warmup == 1 and Train(iterations=10, warmup=0).n_warmup == 0
    assert method_of(composed(*TINY, 'train.iterations=10')).train.n_warmup == 1
    assert method_of(composed('stream=mtil', 'shots=5')).train.n_warmup == 100
    with pytest.raises(ValueError, match='train.warmup is 11'): Train(iterations=10, warmup=11)
    with pytest.raises(ValueError, match='selectors is .*name each once'): Method('m', selectors=('oracle', 'oracle'))

def test_an_order_may_be_a_list_of_tasks():
    from moe_merge_nb.run.job import made
    from moe_merge_nb.streams.datasets import ORDERS
    from moe_merge_nb.streams.order import named_order
    stream = made(composed('order=[MNIST,DTD]').stream)
    assert stream.names == ['MNIST', 'DTD'] and stream.info['order'] == ['MNIST', 'DTD']
    assert named_order(['MNIST', 'DTD'], ORDERS) == ('MNIST', 'DTD') and named_order(2, ORDERS) == ORDERS[2]
    for bad in ([], ['MNIST', 'MNIST'], ['mnist'], 3, 'MNIST', None):
        with pytest.raises(ValueError, match='order is .*each once'): named_order(bad, ORDERS)

def test_a_run_keeps_the_words_of_its_tasks_and_a_tracker_its_settings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    result = job(composed(*FEW, 'method=moe', 'track=tensorboard'), str(tmp_path), False)
    kept = load(tmp_path).tasks
    assert [t.name for t in kept] == result.config['tasks']
    assert tuple(kept[0].classes) == ('red square', 'green square', 'blue square')
    assert kept[0].templates[0] == 'a photo of a {}.'
    assert load_result(tmp_path).config['stream_made']['n_tasks'] == 2
    logs = [EventAccumulator(str(p.parent)).Reload() for p in tmp_path.rglob('events.out*')]
    said = [t for log in logs for t in log.summary_metadata if 'session_start_info' in t]
    assert said and torch.get_num_threads() == 1
    assert 'train.iterations' in next(tmp_path.rglob('hparams.yml')).read_text()
