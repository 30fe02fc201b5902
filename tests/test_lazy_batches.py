"""The order of the images is drawn pass by pass: the same as ever, and a run of any length begins at once."""
from itertools import islice
import pytest
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.safe.batches import batch_indices
from moe_merge_nb.safe.guard import Stop, Stopped
from moe_merge_nb.streams.tasks import toy_stream

def drawn_before(n, batch, iterations, seed):
    "All passes at once."
    g = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(n, generator=g) for _ in range(-(-batch * iterations // n))])
    return [b.tolist() for b in order[:batch * iterations].split(batch)]

@pytest.mark.parametrize('n, batch, iterations', [(48, 8, 12), (10, 3, 7), (5, 13, 4), (7, 7, 3), (1, 4, 2)])
def test_batches_are_what_they_were_when_all_were_drawn_at_once(n, batch, iterations):
    for seed in (0, 1001):
        assert list(batch_indices(n, batch, iterations, seed)) == drawn_before(n, batch, iterations, seed)

def test_a_thousand_million_iterations_are_not_drawn_in_advance():
    assert list(islice(batch_indices(48, 8, 10**9, 0), 12)) == drawn_before(48, 8, 12, 0)

def test_a_run_of_a_thousand_million_iterations_begins_at_once_and_can_be_stopped(tmp_path, monkeypatch):
    def interrupted(stop):
        "Ctrl-C, before the first iteration."
        stop.number = 2
        return stop
    monkeypatch.setattr(Stop, '__enter__', interrupted)
    method = Method('moe', train=Train(iterations=10**9, batch=4, warmup=0), merge=Merge(every=20))
    with pytest.raises(Stopped, match='stopped in task 1 of 1'):
        run(toy_stream(1), method, backbone=load_clip(), directory=tmp_path, progress=False)
