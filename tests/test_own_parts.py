"""Seven kinds of parts of one's own, in one file and without a line of this project: each trains with `moe_merge` from
the command line, is killed, goes on, and ends as if nothing had happened; and what it leaves can be loaded."""
import re
import sys
from pathlib import Path
import pytest
import torch
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run.share import load, save
from test_page_extend import FUNCTIONS, MODULES, SELECTOR
from toys import LEFT, SMALL, begin, end, killed

FEW = [
    *SMALL, 'save_every=2', 'train.iterations=4', 'train.batch=4', 'merge.every=2', 'stream.n_train=12',
    'stream.n_test=6']
LEARNING = [
    'merge.combine=my_parts.strongest', 'selectors=[oracle,my_parts.Nearest]', 'predict=my_parts.sharper']
KINDS = {  # what stands in one run -> arguments
    'merge rule, selector, strategy': LEARNING,
    'gate, expert': ['experts.gate=my_parts.raw_top_k', 'experts.expert=my_parts.Swish'],
    'router, mix': ['experts.router=my_parts.Cosine', 'experts.mix=my_parts.twice'],
    'gelu, mlp': ['experts.expert=gelu', 'experts.router=mlp'],
    'norm': ['experts.expert=norm']}
OWN, OTHERS = list(KINDS)[:3], list(KINDS)[3:]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A working directory with the file of one's own, as a user has it; of every kind a run, made when it is asked for."
    d = tmp_path_factory.mktemp('own')
    (d/'my_parts.py').write_text(FUNCTIONS + MODULES + SELECTOR)
    return d

@pytest.fixture
def here(runs, monkeypatch):
    "There."
    monkeypatch.chdir(runs)
    monkeypatch.syspath_prepend(runs)
    sys.modules.pop('my_parts', None)
    yield runs
    (runs/'my_parts.py').write_text(FUNCTIONS + MODULES + SELECTOR)

def started(kind, directory):
    "The command: its number."
    return begin([*FEW, *KINDS[kind], f'hydra.run.dir={directory}'])

def whole(kind):
    "The run of a kind, undisturbed."
    directory = Path(kind.replace(', ', '-').replace(' ', '_'))
    if not directory.exists(): assert end(started(kind, directory)) == 0, Path('err.txt').read_text()
    return directory

def test_there_are_seven_kinds():
    settings = [setting for kind in OWN for setting in KINDS[kind]]
    assert len(settings) == 7 and all('my_parts.' in s for s in settings)

@pytest.mark.parametrize('kind', KINDS)
def test_a_part_of_ones_own_is_trained_saved_killed_and_resumed(kind, here):
    run, again = whole(kind), Path('killed-' + str(whole(kind)))
    assert killed(started(kind, again), again/'checkpoint.safetensors')
    assert end(started(kind, again)) == 0, Path('err.txt').read_text()
    for name in LEFT: assert (run/name).read_bytes() == (again/name).read_bytes(), name
    names = re.findall(r'my_parts\.\w+', ' '.join(KINDS[kind]))
    assert sorted(load_result(run).config.get('sources') or {}) == sorted(names)
    assert any(e['kind'] == 'merge' for e in load_result(run).events)

@pytest.mark.parametrize('kind', OWN[1:])
def test_what_it_leaves_is_shared_and_loaded_with_trust_only(kind, here):
    run = whole(kind)
    with pytest.raises(ValueError, match='not of this package .my_parts.*trust=True'): load(run)
    model = load(run, trust=True).model
    path = save(model, 'shared.safetensors', name='toy', pretrained='random')
    again, x = load(path, trust=True).model, torch.randn(2, 3, 32, 32)
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
    (here/'my_parts.py').write_text((here/'my_parts.py').read_text() + '\n# edited')
    with pytest.raises(ValueError, match='has changed since'): load(path, trust=True)

def test_an_edited_part_is_another_run(here):
    run, text = whole(OWN[0]), (here/'my_parts.py').read_text()
    (here/'my_parts.py').write_text(text.replace('t.abs().argmax', '(-t.abs()).argmax'))
    assert end(started(OWN[0], run)) == 1
    assert "holds a run with another sources" in (here/'err.txt').read_text()

@pytest.mark.parametrize('kind', OTHERS)
def test_other_kinds_of_this_package_are_shared(kind, here):
    model, x = load(whole(kind)).model, torch.randn(2, 3, 32, 32)
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
