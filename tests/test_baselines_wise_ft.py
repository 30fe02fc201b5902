import copy
from dataclasses import asdict
import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.train import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.learner import *
from moe_merge_nb.baselines.wise_ft import *
def taught(baseline, toy=toy_stream(2)):
    "The original random pico, the model before the second task and the one after it, beside `baseline`."
    clip, tokenizer = load_clip('toy', 'random')
    model = AdaptedCLIP(copy.deepcopy(clip), n_experts=0).eval()
    settings = Train(iterations=3, batch=8, lr=1e-3, warmup=1)
    known = dict(tokenizer=tokenizer, settings=settings, tune='backbone', clip=clip)
    train_task(model, toy[0], 0, **known)
    before = copy.deepcopy(model.clip)
    train_task(model, toy[1], 1, **known, callbacks=[baseline])
    return [torch.cat([p.detach().flatten() for p in c.parameters()]) for c in (clip, before, model.clip)]


def test_alpha_0_is_the_reference_and_1_the_tuned_weights_bit_for_bit():
    _, before, tuned = taught(Callback())
    clip, _, back = taught(WiSEFT(0., 'zero_shot'))
    assert torch.equal(back, clip) and not torch.equal(before, clip) and not torch.equal(tuned, before)
    assert torch.equal(taught(WiSEFT(0.))[2], before)
    assert torch.equal(taught(WiSEFT(1.))[2], tuned) and torch.equal(taught(WiSEFT(1., 'zero_shot'))[2], tuned)


def test_between_the_ends_every_weight_is_the_weighted_mean():
    clip, before, tuned = taught(Callback())
    torch.testing.assert_close(taught(WiSEFT(.3))[2], .7 * before + .3 * tuned)
    torch.testing.assert_close(taught(WiSEFT(.3, 'zero_shot'))[2], .7 * clip + .3 * tuned)


def test_settings_stay_settings():
    wise = WiSEFT()
    mine = copy.deepcopy(wise)
    taught(mine)
    assert mine == wise and asdict(mine) == dict(alpha=.5, reference='before') and not mine.run.weights
    for bad in (dict(alpha=1.5), dict(reference='mean')):
        with pytest.raises(ValueError, match=str(*bad.values())): WiSEFT(**bad)
