"""What is made of a finished run (a prediction, a smaller model, a further task, a run that forgot one, a classifier)
is made with the functions, the model, the words and the images of then; what is there comes back for these only."""
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
import pytest
import torch
from PIL import Image
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.plan import check_backbone
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run import predict
from moe_merge_nb.run.afterwards import predict_job, predict_with
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.extending import extend
from moe_merge_nb.run.job import job
from moe_merge_nb.run.options import composed
from moe_merge_nb.run.reproduce import again
from moe_merge_nb.run.rewrite import rewrite_run
from moe_merge_nb.run.share import load
from moe_merge_nb.run.unlearning import unlearn, unlearn_job
from moe_merge_nb.streams.tasks import Stream, toy_stream

TOY = [
    'stream=toy', 'stream.n_tasks=2', 'stream.n_train=12', 'stream.n_test=6', 'method=moe', 'train.iterations=2',
    'train.batch=4', 'experts.n_experts=4', 'experts.rank=2', 'freeze.n=1', 'selectors=[oracle]', 'image_size=32']
MODEL = 'from moe_merge_nb.clip.backbone import load_clip\ndef f():\n    clip, t = load_clip("toy", "random")\n'
STRATEGY = 'def f(view): return view.logits(view.s)\n'
FEW = dict(steps=2)

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with a model function and a strategy of one's own."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'m.py').write_text(MODEL + '    return clip, t\n')
    (tmp_path/'strategy.py').write_text(STRATEGY)
    yield tmp_path
    for name in ('m', 'strategy'): sys.modules.pop(name, None)

def edited(name, text):
    "As in another process: what was imported is imported again."
    Path(f'{name}.py').write_text(text)
    sys.modules.pop(name, None)

def learned(*more): return job(composed(*TOY, *more), 'run', False)

def further():
    "A task that the run does not know."
    task = replace(toy_stream(1, n_train=12, n_test=6)[0], name='more')
    return Stream('toy', [task], dict(data_seed=0))

MADE = {
    'predict': lambda d: predict_with('run', 'averaged', d, progress=False),
    'unlearn': lambda d: unlearn('run', 'circles', d, options=FEW, progress=False),
    'extend': lambda d: extend('run', further(), d, progress=False),
    'rewrite': lambda d: rewrite_run('run', 'average', 2),
    'load': lambda d: load('run', trust=True),
    'classify': lambda d: load_classifier('run', trust=True)}

EDITS = {
    'other tokens': MODEL + '    return clip, lambda texts: t([x[::-1] for x in texts])\n',
    'another activation': MODEL + '    clip.visual.ln_post.eps = 1.\n    return clip, t\n'}

def test_an_edited_model_function_is_another_model(here):
    learned('model=m.f')
    first = {name: make(f'{name}-before') for name, make in MADE.items()}
    assert MADE['predict']('predict-before').timings == first['predict'].timings
    for edit in EDITS.values():
        edited('m', edit)
        for name, make in MADE.items():
            for directory in (f'{name}-before', f'{name}-after'):               # where it is already, and anew
                says = 'm.f is in a file that has changed since'
                with pytest.raises(ValueError, match=says): make(directory)
            assert not Path(f'{name}-after').exists(), name

def test_an_edited_strategy_is_not_asked_in_the_name_of_the_run(here):
    learned('model=toy', 'predict=strategy.f')
    first = MADE['unlearn']('one')
    edited('strategy', STRATEGY.replace('return ', 'return -'))
    for directory in ('one', 'two'):
        says = 'strategy.f is in a file that has changed since'
        with pytest.raises(ValueError, match=says): MADE['unlearn'](directory)
    assert load_result('one').config == first.config and not Path('two').exists()
    assert len(MADE['predict']('three').matrix) == 2                            # it asks another strategy

def test_what_was_made_comes_back_for_the_same_images_only(here):
    learned('model=toy')
    other = toy_stream(2, n_train=12, n_test=6, seed=1)
    first = {name: MADE[name](name) for name in ('predict', 'unlearn')}
    for make in (predict_with, unlearn):
        name = 'averaged' if make is predict_with else 'circles'
        how = {} if make is predict_with else dict(options=FEW)
        with pytest.raises(ValueError, match="images or words of 'squares' are not those that the run saw"):
            make('run', name, make.__name__[:7], stream=other, progress=False, **how)
    for name, before in first.items(): assert MADE[name](name).timings == before.timings

def test_a_backbone_that_is_given_is_that_of_the_run(here):
    learned('model=toy')
    clip, tokenizer = load_clip('toy', 'random')
    def turned(texts): return tokenizer([t[::-1] for t in texts])
    config = load_result('run').config
    check_backbone(config, clip, tokenizer)
    with pytest.raises(ValueError, match='the tokens of this backbone'): check_backbone(config, clip, turned)
    for make in (
        lambda b: predict_with('run', 'averaged', backbone=b, progress=False),
        lambda b: unlearn('run', 'circles', options=FEW, backbone=b, progress=False),
        lambda b: extend('run', further(), backbone=b, progress=False),
        lambda b: load('run', b),
        lambda b: again(config, b)):
        with pytest.raises(ValueError, match='the tokens of this backbone|its prompts have other tokens'):
            make((clip, turned))
    for b in clip.visual.transformer.resblocks: b.mlp.gelu = torch.nn.ReLU()
    with pytest.raises(ValueError, match='the parts of this backbone'): again(config, (clip, tokenizer))


# ---- the command line, in the working directory

OWN = '''
import torch
class Last:
    "The task that was learned last."
    n_tasks = n_parameters = n_images = 0
    def fit(self, features, labels=None, texts=None): self.n_tasks += 1
    def select(self, features, task=None): return torch.full((len(features),), self.n_tasks - 1)
    def state(self): return dict(n_tasks=self.n_tasks)
    def restore(self, state): self.n_tasks = state['n_tasks']
'''

def test_a_selector_of_ones_own_is_found_beside_the_run(here, monkeypatch, capsys):
    (here/'chosen.py').write_text(OWN)
    learned('model=toy', 'selectors=[chosen.Last]')
    Image.new('RGB', (32, 32), 'red').save('red.png')
    sys.modules.pop('chosen')
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p != str(here)])
    assert predict.main(['run', 'red.png', '--quiet']) == 2 and 'trust' in capsys.readouterr().err
    assert predict.main(['run', 'red.png', '--quiet', '--trust']) == 0
    assert 'circles' in capsys.readouterr().out
    sys.modules.pop('chosen')

def test_images_that_have_moved_are_named_by_root(here):
    for task, colour, split in product(('one', 'two'), ('red', 'blue'), ('train', 'test')):
        d = here/'images'/task/split/colour
        d.mkdir(parents=True)
        for i in range(4): Image.new('RGB', (32, 32), (60*i, 0, 200 if colour == 'blue' else 0)).save(d/f'{i}.png')
    few = [t for t in TOY if not t.startswith('stream')]
    job(composed('stream=folder', 'root=images', 'model=toy', 'train.workers=0', *few), 'run', False)
    (here/'images').rename('moved')
    for make, said in ((predict_job, ['predict=averaged']), (unlearn_job, ['unlearn=two', 'unlearn_options.steps=2'])):
        line = [*said, 'from=run', 'root=moved']
        assert len(make(composed(*line), None, line, False).matrix) == 2
        with pytest.raises(ValueError, match='images'): make(composed(*line[:-1]), None, line[:-1], False)
