"""Classifying computes nothing twice and keeps nothing that nobody reads, and says what the evaluation's code says."""
import pytest
import torch
from moe_merge_nb.layer import mix
from moe_merge_nb.layer.experts import Expert, many
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.features import Encoder
from moe_merge_nb.learn.unlabelled import Asked, TextKept
from moe_merge_nb.run.classify import Classifier
from moe_merge_nb.run.describe import Words
from moe_merge_nb.streams.given import chunks, listed
from toys import toy_model

IMAGES = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))

@pytest.fixture(scope='module')
def kept():
    "An encoder of a classifier, and one of the evaluation that keeps what it knows."
    model, _ = toy_model()
    return TextKept(model, None, Cache(0), 4), Encoder(model, None, Cache(), 4)

def asked():
    [chunk] = chunks(listed(IMAGES), 32)
    return Asked('t', (), (), chunk)

@pytest.mark.parametrize('index', [torch.arange(9), torch.tensor([1, 2, 7])])
def test_features_are_those_of_the_evaluation_to_the_bit(kept, index):
    kept[1].cache.rows = {} # of other batches, whose sums have another order
    with torch.no_grad():
        for name in ('images', 'plain'):
            how = (0,) if name == 'images' else ()
            ours, theirs = (getattr(e, name)(asked(), index, *how) for e in kept)
            if name == 'plain':
                assert torch.equal(ours[1], theirs[1])
                ours, theirs = ours[0], theirs[0]
            assert torch.equal(ours, theirs) and len(ours) == len(index)

def test_no_probe_looks_where_nothing_is_kept(kept, monkeypatch):
    seen, encode = [], type(kept[0].model).encode_image
    def watch(self, x, s, probe=None, **more):
        seen.append(probe)
        return encode(self, x, s, probe, **more)
    monkeypatch.setattr(type(kept[0].model), 'encode_image', watch)
    for e in kept:
        e.cache.rows = {}
        e.images(asked(), torch.arange(9), 0)
    assert seen[:3] == [None] * 3 and len(seen) == 6 and None not in seen[3:]

def test_images_that_are_all_wanted_are_not_copied(kept):
    task = asked()
    first = next(iter(kept[0].loaded(task, torch.arange(9))))
    assert first.data_ptr() == task.test.images.data_ptr()

def test_a_prediction_is_made_once():
    asked, (model, tokenizer) = [], toy_model()
    def once(view):
        asked.append(len(view.features))
        return torch.eye(3)[torch.arange(len(view.features)) % 3]
    words = [Words(f't{i}', ('a', 'b', 'c'), ('a photo of a {}.',)) for i in range(model.n_tasks)]
    c = Classifier(model, tokenizer, words, predict=once)
    assert len(c(IMAGES, task='t0', progress=False)) == 9 and asked == [9]

def test_in_evaluation_nobody_sorts_gates_where_few_experts_are_in_use(monkeypatch):
    experts, x = many(lambda: Expert(8, 16), 6).eval(), torch.randn(5, 4, 8)
    for p in experts.parameters(): torch.nn.init.normal_(p)
    gates = torch.tensor([[.5, .5, 0, 0, 0, 0]] * 4 + [[0, 1., 0, 0, 0, 0]])
    with torch.no_grad():
        want = mix.mix_loop(x, gates, experts)
        monkeypatch.setattr(mix, 'selected', None)
        torch.testing.assert_close(mix.mix_selected(x, gates, experts), want, rtol=1e-5, atol=1e-5)

def test_gates_that_are_all_closed_add_nothing():
    experts = many(lambda: Expert(8, 3), 4).eval()
    with torch.no_grad(): assert not mix.mix_selected(torch.randn(2, 5, 8), torch.zeros(2, 4), experts).any()
