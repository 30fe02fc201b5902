import copy
from dataclasses import asdict
import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.loss import *
from moe_merge_nb.learn.train import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.learner import *
from moe_merge_nb.baselines.lwf import *
def taught(baseline, seen=True, **kw):
    "A random pico before and after the second task of the toy stream, beside `baseline`."
    toy, (clip, tokenizer) = toy_stream(2), load_clip('toy', 'random')
    model = AdaptedCLIP(copy.deepcopy(clip), n_experts=0).eval()
    settings = Train(**dict(dict(iterations=20, batch=12, lr=5e-4, warmup=2), **kw))
    known = dict(settings=settings, tune='backbone', callbacks=[baseline], clip=clip)
    train_task(model, toy[1], 1, tokenizer, **known, seen=toy.tasks[:1] if seen else ())
    return toy, tokenizer, clip, model.clip

def flat(clip): return torch.cat([p.detach().flatten() for p in clip.parameters()])


def test_a_heavy_weight_keeps_the_old_answers():
    def forgotten(weight):
        "How far the answers to the old question moved, on new images."
        toy, tokenizer, before, after = taught(LwF(weight))
        x, tokens = stack(toy[1].test)[0], tokenizer(prompts(toy[0]))
        with torch.no_grad():
            t, s = (class_logits(*features(c, x, tokens), c.logit_scale) for c in (before, after))
        return distil(s, t).item()
    assert forgotten(100.) < .1 * forgotten(0.)


def test_without_an_old_question_lwf_is_fine_tuning():
    weights = {b: flat(taught(b, seen=False, iterations=5)[3]) for b in (LwF(0.), LwF(1.), LwF(1., over='current'))}
    plain, seen, current = weights.values()
    assert torch.equal(plain, seen) and not torch.equal(plain, current)


def test_micro_batches_give_the_same_distillation():
    cases = (1., None), (1., 5), (0., None)
    whole, pieces, without = (flat(taught(LwF(w), iterations=2, micro_batch=m)[3]) for w, m in cases)
    assert (whole - pieces).abs().mean() < .05 * (whole - without).abs().mean()


def test_settings_stay_settings():
    lwf = LwF(2.)
    mine = copy.deepcopy(lwf)
    taught(mine, iterations=3)
    assert mine == lwf and hash(mine) == hash(lwf)
    assert asdict(mine) == dict(weight=2., temperature=2., over='seen')
    assert mine.run.teacher is None and len(mine.run.tokens) and lwf.run.tokens is None
    with pytest.raises(ValueError, match="over is 'old'"): LwF(over='old')
