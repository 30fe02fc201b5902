import pytest, torch
from accelerate import Accelerator
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import *
from moe_merge_nb.merge.combine import *
from moe_merge_nb.merge.align import *
from moe_merge_nb.merge.rule import *
from moe_merge_nb.merge.start import *
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.method import *
from moe_merge_nb.learn.state import *
from moe_merge_nb.learn.recover import *
PLAN = dict(tasks=['a', 'b'], selectors=['oracle'], seed=0)
def begun(directory=None, **kw):
    "A run before its first task."
    return start(
        toy_stream(2), Method('moe', experts=dict(n_experts=4, rank=2), **kw), 0, load_clip('toy', 'random'),
        config=dict(PLAN), accelerator=Accelerator(cpu=True), plan=PLAN, cache=Cache(0), directory=directory)


def test_what_is_saved_comes_back():
    import tempfile
    r = begun(merge=Merge(protect=True))
    r.model.add_task()
    r.done, r.snapshot = 0, dict(task=dict(iteration=3), seconds=1.5)
    with torch.no_grad():
        for p in r.model.moes.parameters(): p.normal_()
    with tempfile.TemporaryDirectory() as d:
        r.directory = d
        assert read_checkpoint(d, PLAN) is None and finished_result(d, PLAN) is None
        save(r, middle=True)
        back = begun(merge=Merge(protect=True))
        restore(back, read_checkpoint(d, PLAN))
    assert back.snapshot == r.snapshot
    for k, w in r.model.moes.state_dict().items(): assert torch.equal(w, back.model.moes.state_dict()[k])


def test_what_is_recovered_belongs_to_one_process_and_is_said_once():
    import tempfile
    from moe_merge_nb.safe.guard import InUse
    one = Accelerator(cpu=True)
    with recovered(None, PLAN, one) as there: assert there == Found()
    with tempfile.TemporaryDirectory() as d:
        with recovered(d, PLAN, one) as there:
            assert there == Found()
            save(begun(d))
            with pytest.raises(InUse), recovered(d, PLAN, one): pass
        with recovered(d, PLAN, one) as there:
            assert there.result is None and there.checkpoint['done'] == 0
        with pytest.raises(NotThisRun, match='another seed'), recovered(d, {**PLAN, 'seed': 1}, one): pass
        with recovered(d, PLAN, one): pass # the lock was given back


def test_another_run_is_not_continued_and_not_overwritten():
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as d:
        save(begun(d), middle=True)
        with pytest.raises(NotThisRun, match='holds a run with another seed .0, not 1.: remove it'):
            read_checkpoint(d, {**PLAN, 'seed': 1})
        Path(d, CHECKPOINT).write_bytes(b'junk')
        says = 'checkpoint.safetensors is no checkpoint, or damaged.*nothing can be continued'
        with pytest.raises(NotThisRun, match=says): read_checkpoint(d, PLAN)
    with tempfile.TemporaryDirectory() as d:
        save(begun(d))
        Path(d, CHECKPOINT).unlink()
        with pytest.raises(NotThisRun, match='not finished, and no checkpoint'): read_checkpoint(d, PLAN)


def test_a_checkpoint_of_another_version_is_not_continued():
    import tempfile
    from moe_merge_nb.safe.checkpoint import write_newest
    with tempfile.TemporaryDirectory() as d:
        write_newest(dict(version=VERSION - 1, plan=PLAN), f'{d}/{CHECKPOINT}')
        with pytest.raises(NotThisRun, match='a checkpoint of another version of this package'):
            read_checkpoint(d, PLAN)


def test_all_that_differs_is_named_with_both_values():
    there = dict(seed=0, train=dict(lr=.1, batch=8), data_sha256=dict(a='1' * 64, b='2' * 64), sources={})
    now = {**there, 'train': dict(lr=.2, batch=8), 'data_sha256': dict(a='1' * 64, b='3' * 64), 'sources': {'r.f': 'x'}}
    belongs(there, there, 'here')
    with pytest.raises(NotThisRun) as e: belongs(there, now, 'here')
    said = str(e.value)
    assert said.startswith('here holds a run with another train.lr (0.1, not 0.2), another data_sha256.b (')
    assert "222' ..., not" not in said and "another sources.r.f (nothing, not 'x')" in said and 'batch' not in said
    with pytest.raises(NotThisRun, match='an earlier version, which did not write down what images'):
        belongs(dict(seed=0), now, 'here')


def test_a_damaged_result_is_an_error_unless_there_is_a_checkpoint():
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as d:
        save(begun(d))
        Path(d, 'events.jsonl').write_text('{}\n')
        with pytest.warns(UserWarning, match='events.jsonl cannot be read .*going on from it'):
            assert finished_result(d, PLAN) is None
        assert read_checkpoint(d, PLAN)['done'] == 0
        Path(d, CHECKPOINT).unlink()
        with pytest.raises(NotThisRun, match='events.jsonl cannot be read .*not those that sha256.json names'):
            finished_result(d, PLAN)


def test_a_full_disk_says_what_is_left():
    import errno, tempfile
    from unittest.mock import patch
    full = OSError(errno.ENOSPC, 'No space left on device')
    says = 'checkpoint.safetensors cannot be written .No space left on device..*the same command goes on'
    with tempfile.TemporaryDirectory() as d:
        r = begun(d)
        save(r)
        with patch('moe_merge_nb.safe.files.os.fsync', side_effect=full), pytest.raises(OSError, match=says) as e:
            save(r)
        assert e.value.errno == errno.ENOSPC and read_checkpoint(d, PLAN)['done'] == 0
