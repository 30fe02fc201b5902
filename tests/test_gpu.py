"""On a GPU: the same features and gradients as on a processor, whole runs, and what is made of them."""
from dataclasses import replace
import pytest
import torch
from toys import toy_model
from moe_merge_nb.baselines.methods import METHODS, SYSTEMS, method
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.cost.gpu import moved, off_processor, waits
from moe_merge_nb.cost.compare import make_case, mode, train_ours
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.results import accuracy_matrix
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.run.classify import load_classifier
from moe_merge_nb.run.share import load, save
from moe_merge_nb.streams.tasks import toy_stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
GPU = torch.device('cuda')
SELECTORS = 'oracle', 'none', 'gaussian', 'autoencoder', 'text'

def small(name, **how):
    "A method that trains for eight iterations."
    train = Train(iterations=8, warmup=2, batch=8, lr=1e-2, **how)
    how = dict(train=train, experts=Experts(n_experts=6, rank=4), selectors=SELECTORS, classes=('task', 'all'))
    return replace(method(name), **how)

def learned(ours, directory=None, **how):
    "A run on the GPU, since Accelerate finds one."
    how |= dict(seed=0, backbone=load_clip(), directory=directory, progress=False)
    return run(toy_stream(2, n_train=60), ours, **how)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp('whole')
    return directory, learned(small('moe_merge'), directory)

def same(a, b):
    "Matrices and adapters, bit for bit."
    assert a.matrix.equals(b.matrix) and a.usage.equals(b.usage)
    assert a.adapters.keys() == b.adapters.keys()
    for name in a.adapters: assert torch.equal(a.adapters[name], b.adapters[name]), name


@pytest.mark.parametrize('precision, images, gradients', [('fp32', 1e-5, 1e-3), ('bf16', 2e-2, 1e-1)])
def test_features_and_gradients_are_those_of_the_processor(precision, images, gradients):
    off = off_processor(lambda: make_case(load_clip(), 10, 8), GPU, precision)
    assert off['images'] < images and off['texts'] < images and off['gradients'] < gradients, off

def test_a_training_iteration_waits_at_most_once_a_block():
    case = moved(make_case(load_clip(), 10, 8), GPU)
    mode(case, True)
    for _ in range(3): train_ours(case)
    assert waits(lambda: train_ours(case), GPU) <= len(case.model.moes) + 2

def test_a_run_is_on_the_gpu_and_says_so(whole):
    assert whole[1].config['device'] == torch.cuda.get_device_name()

def test_the_same_run_twice(whole):
    same(whole[1], learned(small('moe_merge')))

def test_a_run_that_was_stopped_goes_on_to_the_same_end(whole, tmp_path, monkeypatch):
    from moe_merge_nb.learn import train
    step = train.step
    def stopping(learner, *rest, **how):
        if learner.index == 1 and learner.iteration == 5: raise KeyboardInterrupt
        return step(learner, *rest, **how)
    monkeypatch.setattr(train, 'step', stopping)
    with pytest.raises(KeyboardInterrupt): learned(small('moe_merge'), tmp_path, save_every=4)
    monkeypatch.undo()
    assert (tmp_path/'checkpoint.safetensors').exists()
    same(whole[1], learned(small('moe_merge'), tmp_path, save_every=4))

@pytest.mark.parametrize('selector', SELECTORS)
@pytest.mark.parametrize('space', ['task', 'all'])
@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_a_classifier_says_what_the_matrix_says(whole, selector, space, device):
    directory, result = whole
    c, stream = load_classifier(directory, device=device), toy_stream(2, n_train=60)
    last = accuracy_matrix(result, selector if space == 'task' else f'{selector} all')[-1]
    for i, task in enumerate(stream):
        found = c(task.test, task=i, selector=selector, classes=space, progress=False)
        right = [task.classes[y] for y in task.test.labels.tolist()]
        accuracy = 100*sum(a == b for a, b in zip(found['class'], right))/len(right)
        images = 1 if device == 'cuda' else 2 # batches of another size, another device: sums in another order
        assert accuracy == pytest.approx(last[i], abs=100*images/len(right) + 1e-6)

@pytest.mark.parametrize('name', [*METHODS, *SYSTEMS])
def test_every_method_runs(name):
    ours = method(name)
    train = replace(ours.train, iterations=15, warmup=2, batch=8, micro_batch=None)
    found = learned(replace(ours, train=train))
    assert len(found.matrix) and not found.matrix.isna().any().any()

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_lower_precisions_train(precision):
    found = learned(small('moe_merge', precision=precision))
    assert found.matrix.notna().all().all()

def test_a_shared_file_of_a_gpu_is_read_on_a_processor(whole, tmp_path):
    model, tokenizer = toy_model()
    model.to(GPU)
    save(model, tmp_path/'a.safetensors', with_backbone=True)
    again = load(tmp_path/'a.safetensors').model
    x = torch.randn(3, 3, *model.clip.visual.image_size)
    with torch.no_grad(): here, there = again.encode_image(x, 1), model.encode_image(x.to(GPU), 1).cpu()
    assert torch.allclose(here, there, atol=1e-4)
