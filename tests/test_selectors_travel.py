"""Fitted selectors are kept with a run, go into a shared file, and come back deciding the same."""
import json
import re
import shutil
from pathlib import Path
import pytest
import torch
from safetensors.torch import load_file, save_file
from moe_merge_nb.learn.results import summary
from moe_merge_nb.learn.saved import SELECTORS, load_result, save_result
from moe_merge_nb.run.header import KEY, read_header
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.share import Shared, load
from moe_merge_nb.safe.checkpoint import checksum
from moe_merge_nb.safe.known import file_digest
from moe_merge_nb.select.restored import restored, sizes_of
from moe_merge_nb.select.select import dataset_features, make_selector
from moe_merge_nb.streams.tasks import toy_stream
from toys import toy_model

ALL = ['oracle', 'none', 'gaussian', 'autoencoder', 'text']
SMALL = [
    'stream=toy', 'stream.n_tasks=2', 'stream.n_train=24', 'stream.n_test=8', 'method=moe', 'train.iterations=2',
    'train.batch=4', 'experts.n_experts=4', 'experts.rank=2', f'selectors=[{",".join(ALL)}]', 'seed=3']

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run with every selector: its result and its directory."
    d = tmp_path_factory.mktemp('runs')/'run'
    return job(composed(*SMALL), str(d), False), d

@pytest.fixture(scope='module')
def shared(run, tmp_path_factory):
    "The run as one file."
    return load(run[1]).save(tmp_path_factory.mktemp('shared')/'x.safetensors')

def same(a, b):
    "Are two trees the same, to the bit?"
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def images():
    "Test images of three toy tasks, one of which no run here has learned."
    return torch.stack([t.test[i][0] for t in toy_stream(n_tasks=3, n_train=24, n_test=8) for i in range(8)])


# ---- a run directory

def test_a_finished_run_keeps_what_its_selectors_know(run):
    result, d = run
    assert list(result.selectors) == ALL and result.callbacks == [{}]
    assert json.loads((d/'sha256.json').read_text())[SELECTORS] == file_digest(d/SELECTORS)
    found = load_result(d, adapters=True, selectors=True)
    assert same(found.selectors, result.selectors) and found.callbacks == result.callbacks
    assert load_result(d).selectors is None
    assert [found.selectors[s]['n_tasks'] for s in ALL] == [2]*5

def test_their_size_is_stated(run):
    [a, b] = run[0].selectors['gaussian']['scatters']
    parts = [a, b, *run[0].selectors['gaussian']['centroids'], *run[0].selectors['gaussian']['kept']]
    said = json.loads((run[1]/'config.json').read_text())['selector_bytes']
    assert said['gaussian'] == sum(8*t.numel() for t in parts) > 8*2*a.numel() and said['oracle'] == 0

def test_a_run_of_before_has_no_such_file_and_is_still_loaded(run, tmp_path):
    old = shutil.copytree(run[1], tmp_path/'old')
    (old/SELECTORS).unlink()
    with pytest.raises(FileNotFoundError, match=SELECTORS): load_result(old, selectors=True) # its digest is there
    sums = json.loads((old/'sha256.json').read_text())
    del sums[SELECTORS]
    (old/'sha256.json').write_text(json.dumps(sums))
    assert load_result(old, adapters=True, selectors=True).selectors is None
    assert load(old).selectors == {} and load(old).callbacks is None

def test_a_damaged_file_is_named(run, tmp_path):
    bad = shutil.copytree(run[1], tmp_path/'bad')
    data = bytearray((bad/SELECTORS).read_bytes())
    data[-3] ^= 1
    (bad/SELECTORS).write_bytes(data)
    for read in (lambda d: load_result(d, selectors=True), load):
        with pytest.raises(ValueError, match=f'{SELECTORS} cannot be read .*damaged, or changed'): read(bad)

def test_a_result_without_them_leaves_no_file_behind(run, tmp_path):
    result, _ = run
    d = save_result(result, tmp_path/'d')
    assert (d/SELECTORS).is_file()
    result = load_result(d)
    assert not (save_result(result, d)/SELECTORS).exists()


# ---- a shared file, and the Hub

def chosen(shared):
    "What every selector but the oracle says of `images`."
    features, _ = dataset_features(shared.model.clip, list(zip(images(), [0]*24)))
    return {n: s.select(features).tolist() for n, s in shared.selectors.items() if n != 'oracle'}

def test_they_decide_the_same_wherever_they_come_from(run, shared, tmp_path):
    result, d = run
    here = load(d)
    folder = tmp_path/'hub'
    here.save_pretrained(folder)
    want = chosen(here)
    assert len({*want['gaussian']}) > 1
    for other in (load(shared), Shared.from_pretrained(folder), load(load(shared).save(tmp_path/'again.safetensors'))):
        assert chosen(other) == want and other.callbacks == [{}]
        assert same({n: s.state() for n, s in other.selectors.items()}, result.selectors)
        assert all(s.seed == 3 for n, s in other.selectors.items() if n in ('gaussian', 'autoencoder', 'text'))

def test_options_of_a_selector_travel(tmp_path):
    model, _ = toy_model(n_tasks=1)
    selector = make_selector('gaussian', quantile=.5)
    selector.fit(*dataset_features(model.clip, toy_stream(n_tasks=1, n_train=24)[0].train))
    shared = Shared(model, name='pico', pretrained='random', selectors=dict(gaussian=selector))
    path = shared.save(tmp_path/'x.safetensors')
    found = load(path).selectors['gaussian']
    assert found.quantile == .5 and torch.equal(found.thresholds, selector.thresholds)

def test_push_to_hub_sends_them(run, monkeypatch):
    sent = {}
    class Api:
        def __init__(self, **how): pass
        def create_repo(self, repo_id, **how): return type('Url', (), dict(repo_id=repo_id))
        def upload_folder(self, folder_path, **how):
            sent['shared'] = load(Path(folder_path)/'adapters.safetensors')
    monkeypatch.setattr('huggingface_hub.hub_mixin.HfApi', Api)
    load(run[1]).push_to_hub('somebody/model')
    assert list(sent['shared'].selectors) == ALL

def test_a_selector_of_other_tasks_or_under_a_wrong_name_is_not_saved(tmp_path):
    model, _ = toy_model(n_tasks=2)
    how = dict(name='pico', pretrained='random')
    one = make_selector('oracle').fit(None)
    with pytest.raises(ValueError, match="'oracle' knows 1 tasks, and there are 2"):
        Shared(model, selectors=dict(oracle=one), **how).save(tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match="'gaussian' is a Oracle"):
        Shared(model, selectors=dict(gaussian=one), **how).save(tmp_path/'x.safetensors')
    assert not (tmp_path/'x.safetensors').exists()

def test_files_of_versions_1_and_2_have_none(shared, tmp_path):
    header = read_header(shared)
    tensors = {k: t for k, t in load_file(shared).items() if not k.startswith('selectors.')}
    del header['states']
    for version in (1, 2):
        text, path = json.dumps({**header, 'version': version}), tmp_path/f'{version}.safetensors'
        save_file(tensors, path, {KEY: text, 'sha256': checksum(text, tensors)})
        assert load(path).selectors == {} and len(load(path).tasks) == 2


# ---- from strangers

def test_states_that_do_not_fit_are_refused_by_name(run, shared, tmp_path):
    good, header = load_file(shared), read_header(shared)
    def refused(says, change, tensors=good):
        said = json.loads(json.dumps(header))
        kept = change(said['states']['dict'])
        text, path = json.dumps(said), tmp_path/'odd.safetensors'
        tensors = {**tensors, **(kept or {})}
        save_file(tensors, path, {KEY: text, 'sha256': checksum(text, tensors)})
        with pytest.raises(ValueError, match=r'odd\.safetensors: .*' + says): load(path)
    part = lambda tree, name: tree['selectors']['dict'][name]['dict']
    state = lambda tree, name: part(tree, name)['state']['dict']
    first = lambda tree, key: 'selectors.' + state(tree, 'gaussian')[key][0]['tensor']
    gone = 'selectors.' + state(header['states']['dict'], 'gaussian')['kept'][1]['tensor']
    refused("'gaussian'.kept must be a list of 2", lambda t: state(t, 'gaussian')['kept'].pop() and None,
            {k: w for k, w in good.items() if k != gone})
    refused(r"'gaussian'.scatters\[0\] is \(3, 3\)", lambda t: {first(t, 'scatters'): torch.zeros(3, 3).double()})
    refused(r"scatters\[0\] is .*float64", lambda t: {first(t, 'scatters'): good[first(t, 'scatters')].float()})
    refused('holds NaN', lambda t: {first(t, 'scatters'): good[first(t, 'scatters')]*torch.nan})
    refused('cannot be made again', lambda t: {first(t, 'scatters'): -good[first(t, 'scatters')]})
    refused("'oracle' must hold", lambda t: state(t, 'oracle').update(more=1))
    refused("'oracle' knows 7 tasks", lambda t: state(t, 'oracle').update(n_tasks=7))
    refused("no option 'code'", lambda t: part(t, 'gaussian')['options']['dict'].update(code='x'))
    refused('quantile=2', lambda t: part(t, 'text')['options']['dict'].update(quantile=2))
    refused('a tensor that is not there', lambda t: state(t, 'text').update(thresholds={'tensor': 'nowhere'}))
    refused('that nothing names', lambda t: {'selectors.t999': torch.zeros(1)})
    refused('no states of selectors', lambda t: t.update(selectors=[1]))
    refused('no states of selectors', lambda t: t.update(callbacks='x'))
    strange = lambda s: s.update({'os.system': s['oracle']})
    refused(r'not of this package \(os.system\)', lambda t: strange(t['selectors']['dict']))

def test_an_auto_encoder_of_another_size_is_refused(run):
    sizes, state = sizes_of(load(run[1]).model.clip, 2), run[0].selectors['autoencoder']
    assert restored('autoencoder', state, {}, sizes).n_tasks == 2
    odd = {**state, 'nets': [state['nets'][0], {**state['nets'][1], 'down.bias': torch.zeros(3)}]}
    with pytest.raises(ValueError, match=r"nets\[1\].down.bias is \(3,\), not torch.float32 \(64\)"):
        restored('autoencoder', odd, {}, sizes)

OWN = '''
from moe_merge_nb.select.select import Oracle
class Mine(Oracle):
    def select(self, features, task=None): return super().select(features, 0)
'''

def test_a_selector_of_ones_own_needs_trust_and_its_file(tmp_path, monkeypatch):
    (tmp_path/'mine_travels.py').write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    from mine_travels import Mine
    model, _ = toy_model(n_tasks=1)
    mine = Shared(model, name='pico', pretrained='random', selectors={'mine_travels.Mine': Mine().fit(None)})
    path = mine.save(tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match='mine_travels.Mine.*trust=True'): load(path)
    assert type(load(path, trust=True).selectors['mine_travels.Mine']) is Mine
    header = read_header(path)
    assert len(header['sources']['mine_travels.Mine']) == 64


# ---- the card

def test_the_card_says_what_the_model_knows_and_its_snippet_runs(run, tmp_path):
    shared, folder = load(run[1]), tmp_path/'hub'
    shared.save_pretrained(folder, model_card_kwargs=dict(license='mit', repo_id=str(folder)))
    card = (folder/'README.md').read_text()
    assert re.search('^license: mit$', card, re.M)
    assert '| squares | red square, green square, blue square |' in card
    row = summary(run[0]).set_index('selector').loc['gaussian']
    shown = [f'{row[m]:.1f}' for m in ('Transfer', 'Average', 'Last')]
    assert f'| gaussian | {" | ".join(shown)} |' in card
    snippet = [line[4:] for line in card.splitlines() if line.startswith('    ')]
    assert len(snippet) == 5
    said = dict(images=images())
    exec('\n'.join(snippet).replace('THIS REPOSITORY', str(folder)), said)
    assert said['answers'].shape == (24,) and said['answers'].max() < 3

def test_a_licence_is_never_made_up(tmp_path):
    model, _ = toy_model(n_tasks=1)
    card = str(Shared(model, name='pico', pretrained='random').generate_model_card())
    assert 'license: unknown' in card and 'THIS REPOSITORY' in card
    assert '| task | classes |' not in card and 'Transfer' not in card
