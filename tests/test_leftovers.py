"""What is left on the disk: nothing of killed writers, nothing that grows, and files that others may read."""
import os
import signal
import stat
import threading
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.recover import CHECKPOINT
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.safe.checkpoint import write_tree
from moe_merge_nb.safe.files import check_writable, keep_newest, read_text, replacing, write_text
from moe_merge_nb.safe.guard import LOCK, OWNER, locked, owner
from moe_merge_nb.streams import mini as page
from moe_merge_nb.streams.images import saved_few_shot
from moe_merge_nb.streams.tasks import toy_stream

QUICK = Method('moe', train=Train(iterations=2, batch=4, warmup=0))


def mode(path): return stat.S_IMODE(os.stat(path).st_mode)

@pytest.fixture
def umask():
    "Another umask, put back afterwards."
    before = os.umask(0o027)
    yield 0o666 & ~0o027
    os.umask(before)

def test_every_file_of_a_run_has_the_rights_that_the_umask_gives(tmp_path, umask):
    run(toy_stream(1), QUICK, directory=tmp_path/'run', progress=False)
    modes = {p.name: mode(p) for p in (tmp_path/'run').iterdir() if p.name != LOCK}
    assert 'adapters.safetensors' in modes and set(modes.values()) == {umask}

def test_a_checkpoint_has_the_rights_that_the_umask_gives(tmp_path, umask):
    assert mode(write_tree(dict(w=torch.ones(2)), tmp_path/'a.safetensors')) == umask

def killed_while_saving(path):
    "A process that is killed in the middle of safetensors' own writing, whose temporary file it leaves."
    pid = os.fork()
    if pid == 0:
        with replacing(path) as part:
            save_file(dict(w=torch.ones(100_000)), part)
            part.rename(part.with_name('.tmpAb12Cd'))                          # as it is called until it is complete
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)

def everything(directory): return sorted(str(p.relative_to(directory)) for p in directory.rglob('*') if p.is_file())

def test_what_a_library_had_begun_when_it_was_killed_is_removed_by_the_next_run(tmp_path):
    killed_while_saving(tmp_path/'checkpoint.safetensors')
    assert [Path(p).name for p in everything(tmp_path)] == ['.tmpAb12Cd']
    assert Path(everything(tmp_path)[0]).parent != Path('.')                    # nothing in the place of finished files
    with locked(tmp_path): assert everything(tmp_path) == [LOCK, OWNER]

def test_in_a_cache_it_is_removed_after_a_day_by_whoever_writes_there_next(tmp_path):
    killed_while_saving(tmp_path/'seed0.npz')
    write_text(tmp_path/'seed1.npz', 'x')
    assert len(everything(tmp_path)) == 2
    [left] = (p for p in tmp_path.iterdir() if p.is_dir())
    os.utime(left, (0, 0))
    write_text(tmp_path/'seed2.npz', 'x')
    assert everything(tmp_path) == ['seed1.npz', 'seed2.npz']

def test_a_finished_run_keeps_no_checkpoint(tmp_path):
    run(toy_stream(1), QUICK, directory=tmp_path, progress=False)
    for name in (CHECKPOINT, 'checkpoint.before.safetensors'): write_tree(dict(a=1), tmp_path/name)
    assert len(run(toy_stream(1), QUICK, directory=tmp_path, progress=False).matrix) == 1
    assert [p.name for p in tmp_path.glob('checkpoint*')] == []

def test_a_cache_keeps_the_files_that_were_written_last(tmp_path):
    for i in range(5):
        (tmp_path/f'mini-{i}.npz').touch()
        os.utime(tmp_path/f'mini-{i}.npz', (100 - i, 100 - i))
    (tmp_path/'other.npz').touch()
    keep_newest(tmp_path, 'mini-*.npz', 2)
    assert everything(tmp_path) == ['mini-0.npz', 'mini-1.npz', 'other.npz']

def test_the_drawn_images_of_a_ninth_seed_take_the_place_of_the_first(tmp_path):
    for seed in range(10):
        path = tmp_path/f'mini-v2-seed{seed}-20-2.safetensors'
        page._write(path, dict(a=np.zeros(3)))
        os.utime(path, (seed, seed))
    assert len(everything(tmp_path)) == 8 and not (tmp_path/'mini-v2-seed0-20-2.safetensors').exists()

def at_once(n, f):
    "The errors of `f`, called by `n` threads."
    errors = []
    def call():
        try: f()
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=call) for _ in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return errors

def test_many_may_ask_at_once_whether_a_directory_can_be_written_to(tmp_path):
    def ask():
        for _ in range(100): check_writable(tmp_path/'run')
    assert at_once(16, ask) == [] and everything(tmp_path) == []

def test_many_may_write_the_same_file_at_once(tmp_path):
    def write():
        for _ in range(5): write_text(tmp_path/'a', 'x' * 1000)
    assert at_once(8, write) == [] and everything(tmp_path) == ['a']

def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'long').write_text('x' * 1001)
    (tmp_path/'text').write_text('gr\u00fcn', encoding='utf-8-sig')
    (tmp_path/'link').symlink_to('text')
    for path in (tmp_path/'pipe', '/dev/zero'):
        with pytest.raises(OSError, match='no regular file'): read_text(path)
    with pytest.raises(OSError, match='more than 1,000 bytes'): read_text(tmp_path/'long', most=1000)
    assert read_text(tmp_path/'text') == read_text(tmp_path/'link') == 'gr\u00fcn'
    with pytest.raises(OSError): read_text(tmp_path/'link', follow=False)

@pytest.mark.parametrize('kind', ['pipe', 'link', 'device'])
def test_the_note_of_a_lock_is_never_opened_where_it_is_something_else(tmp_path, kind):
    note, mine = tmp_path/'run'/OWNER, tmp_path/'thesis.txt'
    note.parent.mkdir()
    mine.write_text('1 here')
    if kind == 'pipe': os.mkfifo(note)
    else: note.symlink_to(mine if kind == 'link' else '/dev/zero')
    assert owner(note.parent) is None
    with locked(note.parent): assert owner(note.parent)[0] == os.getpid() and not note.is_symlink()
    assert mine.read_text() == '1 here' and not note.exists()

def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    mine = tmp_path/'thesis.txt'
    mine.write_text('mine')
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/LOCK).symlink_to(mine)
    with pytest.raises(OSError, match='run/.lock cannot be written .*symbolic links'), locked(tmp_path/'run'): pass
    assert mine.read_text() == 'mine'

def test_a_list_of_few_shots_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path/'few.json')
    with pytest.raises(ValueError, match='few.json is no few-shot list .*no regular file'):
        saved_few_shot(tmp_path/'few.json', [0, 1], 1)

def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path/'new'): raise ValueError('refused')
    assert not (tmp_path/'new').exists()
    (tmp_path/'old').mkdir()
    with locked(tmp_path/'old'): pass
    assert everything(tmp_path/'old') == []
    with locked(tmp_path/'old'): (tmp_path/'old'/'file').write_text('x')
    assert (tmp_path/'old'/LOCK).is_file()
