"""A model that cannot be had says so at once, and what would help."""
import warnings
import pytest
from huggingface_hub import constants
from moe_merge_nb.clip import backbone
from moe_merge_nb.clip.backbone import load_clip, reachable
from moe_merge_nb.learn.settings import Train

def test_nobody_answers_nowhere(monkeypatch):
    assert not reachable('http://127.0.0.1:9', seconds=1)
    def page(*args, **kwargs): raise backbone.urllib.error.HTTPError('x', 404, 'no', {}, None)
    monkeypatch.setattr(backbone.urllib.request, 'urlopen', page)
    assert reachable('http://127.0.0.1:9')

def test_offline_the_hub_is_asked_for_its_cache_only_and_the_remedy_is_said(monkeypatch):
    tried = []
    def download(tag):
        tried.append(constants.HF_HUB_OFFLINE)
        raise OSError('not in the cache')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(backbone, 'reachable', lambda url: False)
    monkeypatch.setattr(backbone, 'download_pretrained', download)
    with pytest.raises(ConnectionError, match='Offline: on a machine with a network run'):
        load_clip('ViT-B-16-quickgelu', 'openai')
    assert tried == [True] and constants.HF_HUB_OFFLINE is False

@pytest.mark.parametrize('name', ['ViT-B-16-SigLIP', 'roberta-ViT-B-32'])
def test_towers_of_another_library_are_refused_with_its_name(name):
    with pytest.raises(ValueError, match='pip install transformers.*only a CLIP of two transformers is supported'):
        load_clip(name, 'random')

def test_no_more_workers_than_cores(monkeypatch):
    import os
    from torch.utils.data import DataLoader
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    settings = Train(workers=64)
    assert settings.workers == 64 and settings.n_workers == 2 and Train(workers=1).n_workers == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DataLoader([1], num_workers=settings.n_workers)
