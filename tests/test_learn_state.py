import pytest, torch
from accelerate import Accelerator
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import *
from moe_merge_nb.merge.combine import *
from moe_merge_nb.merge.align import *
from moe_merge_nb.merge.rule import *
from moe_merge_nb.merge.start import *
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.train import *
from moe_merge_nb.learn.results import *
from moe_merge_nb.learn.method import *
from moe_merge_nb.learn.state import *
def begun(**kw):
    "A run before its first task."
    return start(
        toy_stream(2), Method('moe', experts=dict(n_experts=4, rank=2), **kw), 0, load_clip('toy', 'random'),
        config={}, accelerator=Accelerator(cpu=True), plan={}, cache=Cache(0))


def test_a_state_that_is_restored_is_the_same_state():
    r = begun(merge=Merge(protect=True))
    for _ in range(2): r.model.add_task()
    r.done, r.snapshot = 1, dict(trained=dict(train=1.5))
    r.selectors['oracle'].fit(None, None, None)
    r.callbacks[0].protected = {('image', 0): {1, 3}}
    with torch.no_grad():
        for p in r.model.moes.parameters(): p.normal_()
    back, saved = begun(merge=Merge(protect=True)), state(r)
    restore(back, saved)
    now = state(back)
    assert all(torch.equal(w, now['weights'][k]) for k, w in saved['weights'].items())
    assert {**now, 'weights': None} == {**saved, 'weights': None}


def test_a_checkpoint_with_missing_extra_or_other_tensors_is_refused_by_name():
    weights = state(begun())['weights']
    for odd, says in (
        ({k: w for k, w in weights.items() if k != '0.frozen'}, '1 missing: 0.frozen'),
        ({**weights, 'more': torch.ones(1)}, '1 left over: more'),
        ({**weights, '0.frozen': torch.zeros(5, dtype=torch.bool)}, '1 of another shape: 0.frozen'),
    ):
        with pytest.raises(ValueError, match=f'the model in this checkpoint does not fit: {says}'):
            restore(begun(), {**state(begun()), 'weights': odd})
