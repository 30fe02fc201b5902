import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.streams.tasks import prompts, toy_stream


def test_a_callback_that_keeps_something_must_say_what():
    class Adds(Callback):
        def loss(self, learner, images, labels): return None
    class Counts(Callback):
        def after_step(self, learner): self.n = learner.iteration
    class Says(Counts):
        def snapshot(self): return dict(n=self.n)
    says = Says()
    says.n = 2
    assert [c.snapshot() for c in (Callback(), Adds(), Counts(), says)] == [{}, {}, None, dict(n=2)]
