import pytest
import torch
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.layer.experts import read, write
from moe_merge_nb.learn.features import Encoder, class_embeddings
from moe_merge_nb.streams.tasks import prompts, stack, toy_stream
from toys import toy_model


def test_class_embeddings_average_unit_features_over_templates():
    net, tok = toy_model()
    task = toy_stream(1)[0]
    a, b = (net.encode_text(tok(prompts(task, t)), 1) for t in task.templates)
    mean = a/a.norm(dim=1, keepdim=True) + b/b.norm(dim=1, keepdim=True)
    w = class_embeddings(net, tok, task, 1)
    torch.testing.assert_close(w, mean/mean.norm(dim=1, keepdim=True))
    assert not torch.allclose(w, class_embeddings(net, tok, task, -1), atol=1e-2) # whose routers matters


def test_encoded_once_while_nothing_changes():
    net, tok = toy_model()
    (task,), encoder = toy_stream(1), Encoder(*toy_model(), batch=5)
    images, labels = stack(task.test)
    for index in (torch.arange(0, 24, 2), torch.arange(24)):
        for s in (0, 1):
            by_hand = net.encode_image(images[index], s).detach()
            torch.testing.assert_close(encoder.images(task, index, s), by_hand, rtol=1e-4, atol=1e-4)
        assert torch.equal(encoder.classes(task, 1), class_embeddings(net, tok, task, 1))
        assert torch.equal(encoder.plain(task, index)[1], labels[index])
    assert encoder.passes == dict(images=24*3, prompts=6)


def test_features_do_not_depend_on_which_images_are_encoded_together():
    (net, tok), (task,) = toy_model(), toy_stream(1)
    every = Encoder(net, tok).images(task, torch.arange(24), 0)
    for n in (1, 2, 3, 5, 9):
        some = Encoder(net, tok).images(task, torch.arange(n), 0)
        torch.testing.assert_close(some, every[:n], rtol=1e-6, atol=1e-6)


def test_text_is_encoded_again_when_an_expert_it_used_has_changed():
    (net, tok), (task,) = toy_model(), toy_stream(1)
    cache, text, probe = Cache(), [m for m in net.moes if m.tower == 'text'], []
    net.encode_text(tok(prompts(task)), 1, probe.append)
    used, n = probe[1].gates[0] > 0, len(task.classes)*len(task.templates)
    for e in range(len(used)):
        Encoder(net, tok, cache).classes(task, 1)
        expert = text[1].experts[e]
        write(expert, {name: t + .1 for name, t in read(expert).items()})
        encoder = Encoder(net, tok, cache)
        torch.testing.assert_close(encoder.classes(task, 1), class_embeddings(net, tok, task, 1))
        assert encoder.passes['prompts'] == n*used[e]
