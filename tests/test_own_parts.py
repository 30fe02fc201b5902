"""Seven kinds of parts of one's own, in one file and without a line of this project: each trains with `moe_merge` from
the command line, is killed, goes on, and ends as if nothing had happened; and what it leaves can be loaded."""
import os
import re
import signal
import sys
import time
from pathlib import Path
import pytest
import torch
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run import cli, command
from moe_merge_nb.run.share import load, save
from test_page_extend import FUNCTIONS, MODULES, SELECTOR

SMALL = [
    'method=moe_merge', 'stream=toy', 'stream.n_tasks=2', 'model=random', 'save_every=4', 'train.iterations=8',
    'train.warmup=2', 'selectors=[oracle]', 'train.batch=8', 'experts.n_experts=6', 'experts.rank=2']
KINDS = {
    'merge rule': ['merge.combine=my_parts.strongest'],
    'gate': ['experts.gate=my_parts.raw_top_k'],
    'expert': ['experts.expert=my_parts.Swish'],
    'router': ['experts.router=my_parts.Cosine'],
    'mix': ['experts.mix=my_parts.twice'],
    'selector': ['selectors=[oracle,my_parts.Nearest]'],
    'strategy': ['predict=my_parts.sharper']}
LEFT = ['matrix.csv', 'selection.csv', 'usage.csv', 'fixed.csv', 'events.jsonl', 'adapters.safetensors']


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with the file of one's own, as a user has it."
    (tmp_path/'my_parts.py').write_text(FUNCTIONS + MODULES + SELECTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop('my_parts', None)
    return tmp_path

def begin(arguments, directory):
    "`moe-merge` in a forked process: its number."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        torch.set_num_threads(1)
        for fd in (1, 2): os.dup2(os.open('out.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
        sys.argv = ['moe-merge', *SMALL, *arguments, f'hydra.run.dir={directory}']
        cli.main()
        code = 0
    except SystemExit as e: os.write(2, f'{e}\n'.encode())
    finally: os._exit(code)

def end(pid):
    "The exit code of a process."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed(arguments, directory, here):
    "The same run, killed as soon as it has saved something, and begun again."
    pid, checkpoint = begin(arguments, directory), here/directory/'checkpoint.safetensors'
    while not checkpoint.is_file() and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(.005)
    os.kill(pid, signal.SIGKILL)
    interrupted = end(pid) == -signal.SIGKILL
    assert end(begin(arguments, directory)) == 0, (here/'out.txt').read_text()
    return interrupted

@pytest.mark.parametrize('kind', KINDS)
def test_a_part_of_ones_own_is_trained_saved_killed_and_resumed(kind, here):
    assert end(begin(KINDS[kind], 'whole')) == 0, (here/'out.txt').read_text()
    assert killed(KINDS[kind], 'killed', here)
    for name in LEFT: assert (here/'whole'/name).read_bytes() == (here/'killed'/name).read_bytes(), name
    [name] = re.findall(r'my_parts\.\w+', KINDS[kind][0])
    assert list(load_result('whole').config['sources']) == [name]

@pytest.mark.parametrize('kind', ['gate', 'expert', 'router', 'mix'])
def test_what_it_leaves_is_shared_and_loaded_with_trust_only(kind, here):
    assert end(begin(KINDS[kind], 'run')) == 0
    with pytest.raises(ValueError, match='not of this package .my_parts.*trust=True'): load('run')
    model = load('run', trust=True).model
    path = save(model, 'shared.safetensors', name='pico', pretrained='random')
    again, x = load(path, trust=True).model, torch.randn(2, 3, 32, 32)
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
    (here/'my_parts.py').write_text((here/'my_parts.py').read_text() + '\n# edited')
    with pytest.raises(ValueError, match='has changed since'): load(path, trust=True)

def test_an_edited_part_is_another_run(here):
    how = KINDS['merge rule']
    assert end(begin(how, 'run')) == 0
    text = (here/'my_parts.py').read_text()
    (here/'my_parts.py').write_text(text.replace('t.abs().argmax', '(-t.abs()).argmax'))
    assert end(begin(how, 'run')) == 1
    assert "holds a run with another sources" in (here/'out.txt').read_text()

@pytest.mark.parametrize('kind', ['experts.expert=gelu', 'experts.expert=norm', 'experts.router=mlp'])
def test_other_kinds_of_this_package_merge_and_are_saved_resumed_and_shared(kind, here):
    assert end(begin([kind], 'whole')) == 0, (here/'out.txt').read_text()
    assert killed([kind], 'killed', here)
    for name in LEFT: assert (here/'whole'/name).read_bytes() == (here/'killed'/name).read_bytes(), name
    assert any(e['kind'] == 'merge' for e in load_result('whole').events)
    model, x = load('whole').model, torch.randn(2, 3, 32, 32)
    again = load(save(model, 'shared.safetensors', name='pico', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
