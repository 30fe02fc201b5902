"NaN is no accuracy: where a number is none, the parameter, the image or the class is named, and nothing is returned"

import copy
from dataclasses import replace
import pytest
import torch
from torch.utils.data import Dataset, Subset
from moe_merge_nb.baselines.methods import METHODS, method
from moe_merge_nb.clip.backbone import load_clip, write_weights
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.sanity import NotANumber, image_of
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.rewrites.bank import banks, with_banks
from moe_merge_nb.rewrites.reduce import last
from moe_merge_nb.rewrites.statistics import calibrate
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed
from moe_merge_nb.select.select import Latest, Oracle
from moe_merge_nb.streams.tasks import Stream, toy_stream

class Spoiled(Dataset):
    "A dataset with one number in one image that is none"
    def __init__(self, dataset, at, value, paths=None):
        self.inner, self.at, self.value, self.labels = dataset, at, value, dataset.labels
        if paths: self.paths = paths
    def __len__(self): return len(self.inner)
    def __getitem__(self, i):
        x, y = self.inner[i]
        if i == self.at: x[1, 2, 3] = self.value
        return x, y

def spoiled(split, at=5, value=torch.nan, **how):
    "Two tasks, the second with such an image"
    first, second = toy_stream(2, n_train=12, n_test=8)
    data = Spoiled(getattr(second, split), at, value, **how)
    parts = dict(train=data, calibration=data) if split == 'train' else dict(test=data)
    return Stream('spoiled', (first, replace(second, **parts)), dict(data_seed=0))

def small(name, **how):
    "A method of the study, trained for a moment"
    m = method(name)
    experts = m.experts and replace(m.experts, n_experts=4, rank=2)
    train = replace(m.train, iterations=3, warmup=1, batch=12)
    if name in ('lwf', 'icarl', 'wise_ft', 'finetune'): train = replace(train, lr=1e-5)
    return replace(m, experts=experts, train=train, **how)

KINDS = ['zero_shot', 'finetune', 'moe', 'moe_merge', 'rail', 'rail_kernel', 'lwf', 'wise_ft', 'icarl']

CASES = [*((name, torch.nan) for name in KINDS), ('zero_shot', torch.inf), ('moe', -torch.inf)]

@pytest.mark.parametrize('name, value', CASES)
def test_a_test_image_is_named_for_every_method(name, value):
    says = "task 'circles', test images by .*: the features of image 5 are NaN or infinite: its pixels are"
    with pytest.raises(NotANumber, match=says): run(spoiled('test', value=value), small(name), progress=False)

@pytest.mark.parametrize('name', ['finetune', 'moe', 'rail', 'rail_kernel', 'lwf'])
def test_a_training_image_is_named_for_every_method(name):
    says = 'image 5.* (holds NaN or infinity|are NaN or infinite: its pixels are)'
    with pytest.raises(FloatingPointError, match=says) as e: run(spoiled('train'), small(name), progress=False)
    assert "'circles'" in str(e.value)

@pytest.mark.parametrize('selector', ['gaussian', 'autoencoder', 'text'])
def test_an_image_that_no_batch_had_is_found_by_the_selectors(selector):
    stream = spoiled('train', at=11)
    m = small('moe', selectors=(selector,))
    m = replace(m, train=replace(m.train, iterations=1, batch=1, warmup=0))
    with pytest.raises(NotANumber, match="task 'circles', training images by plain CLIP: the features of image 11"):
        run(stream, m, progress=False)

def test_an_image_that_no_batch_had_is_no_exemplar():
    m = small('icarl')
    m = replace(m, train=replace(m.train, iterations=1, batch=1, warmup=0))
    with pytest.raises(NotANumber, match="task 'circles', training images: the features of image 11"):
        run(spoiled('train', at=11), m, progress=False)

def test_where_an_image_has_a_file_it_is_named(tmp_path):
    paths = [f'photos/{i}.png' for i in range(24)]
    stream = spoiled('test', at=3, paths=paths)
    with pytest.raises(NotANumber, match=r'image 3 \(photos/3.png\)'): run(stream, small('zero_shot'), progress=False)
    assert image_of(Subset(stream[1].test, [7, 3]), 1) == 'image 1 (photos/3.png)'
    assert image_of(toy_stream(1)[0].test, 4) == 'image 4'

# weights

def with_nan(name='visual.transformer.resblocks.1.mlp.c_fc.weight', value=torch.nan):
    "A backbone with one number that is none"
    clip, tokenizer = load_clip()
    clip = copy.deepcopy(clip)
    clip.get_parameter(name).view(-1)[7] = value
    return clip, tokenizer

@pytest.mark.parametrize('name', ['visual.proj', 'token_embedding.weight', 'logit_scale_', 'ln_final.bias'])
def test_a_backbone_that_holds_NaN_is_refused_before_any_work(name, tmp_path):
    clip, tokenizer = load_clip()
    clip, name = copy.deepcopy(clip), name.rstrip('_')
    clip.get_parameter(name).view(-1)[0] = torch.inf if name == 'logit_scale' else torch.nan
    says = rf'the backbone holds NaN or infinity in 1 tensors: {name} \(1 of the'
    with pytest.raises(NotANumber, match=says):
        run(toy_stream(1), small('zero_shot'), backbone=(clip, tokenizer), directory=tmp_path/'run', progress=False)
    assert not (tmp_path/'run').exists()

def test_the_command_line_says_so_in_one_line(tmp_path):
    write_weights(with_nan()[0], tmp_path/'w.safetensors')
    quick = ['stream=toy', 'stream.n_tasks=1', f'model.pretrained={tmp_path}/w.safetensors', 'method=zero_shot']
    with pytest.raises(UsageError, match='backbone holds NaN or infinity.*resblocks.1.mlp.c_fc.weight'):
        job(composed(*quick), str(tmp_path/'run'), progress=False)
    assert not (tmp_path/'run').exists()

def adapted(clip=None):
    "A model that has learned two tasks, somehow"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AdaptedCLIP(clip or copy.deepcopy(load_clip()[0]), n_experts=4, rank=2)
        for _ in range(2): model.add_task()
    return model.eval()

def row(model, stream=None, cache=None):
    picks = {'none': Latest().fit(None).fit(None), 'oracle': Oracle().fit(None).fit(None)}
    stream = stream or toy_stream(2, n_test=8)
    return evaluate(model, load_clip()[1], stream, picks, after='x', progress=False, cache=cache).matrix

def test_an_evaluation_names_the_weights():
    clip = load_clip()[0]
    for name, says in {
        'visual.proj': "task 'squares', test images by plain CLIP: .* the weights .*visual.proj are",
        'text_projection': "task 'squares', by plain CLIP: .*text features of class 'red square' .*text_projection",
    }.items():
        with pytest.raises(NotANumber, match=says): row(adapted(with_nan(name)[0]))
    model = adapted()
    for e in model.moes[1].experts: e.up.bias.data[0] = torch.inf
    with pytest.raises(NotANumber, match='test images by the routers of task 1: .*moes.1.experts.0.up.bias'): row(model)
    model = adapted()
    for r in model.moes[-1].routers: r.gate.data[0] = torch.nan
    with pytest.raises(NotANumber, match='text features of class .*moes.6.routers.0.gate'): row(model)
    model = adapted(copy.deepcopy(clip))
    model.clip.logit_scale.data.fill_(torch.nan)
    with pytest.raises(NotANumber, match=r'logits are NaN or infinite, and so are exp\(logit_scale\)'): row(model)

def test_it_is_looked_at_with_and_without_a_cache_and_in_every_label_space():
    stream, cache = toy_stream(2, n_test=8), Cache()
    row(adapted(), stream, cache)
    with pytest.raises(NotANumber, match='image 5'): row(adapted(), spoiled('test'), cache)
    model = adapted()
    with torch.no_grad(): model.clip.visual.proj[0, 0] = torch.nan
    with pytest.raises(NotANumber, match='visual.proj'): row(model, stream, cache)

def test_weights_that_became_no_numbers_in_training_are_named():
    class Break(type(method('moe').freeze)):
        def after_task(self, learner): learner.model.moes[2].experts[1].up.weight.data[0, 0] = torch.inf
    m = replace(small('moe'), freeze=Break())
    with pytest.raises(NotANumber, match="after task 'squares', 1 tensors .*moes.2.experts.1.up.weight"):
        run(toy_stream(1), m, progress=False)

def test_rewrites_look_too():
    "What they are calibrated on, and what they are measured by"
    model, tokenizer = adapted(), load_clip()[1]
    with pytest.raises(NotANumber, match="'circles', training images: the features of image 5"):
        calibrate(model, tokenizer, spoiled('train'), images=12)
    with pytest.raises(NotANumber, match="'circles', test images: the features of image 5"):
        last(model, tokenizer, spoiled('test'))
    small_ = with_banks(model, banks(model))
    small_.moes[0].experts[0].up.bias.data[0] = torch.nan
    small_.moes[0].always_on[0] = 1.
    with pytest.raises(NotANumber, match='moes.0.experts.0.up.bias'): last(small_, tokenizer, toy_stream(2))

def test_a_mask_in_a_buffer_may_be_infinite():
    clip, tokenizer = load_clip()
    clip = copy.deepcopy(clip)
    clip.register_buffer('mask', torch.full((3,), -torch.inf))
    run(toy_stream(1, n_test=4), small('zero_shot'), backbone=(clip, tokenizer), progress=False)
    assert set(METHODS) >= set(KINDS)
