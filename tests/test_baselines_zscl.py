import copy
from dataclasses import asdict
import pytest, torch
from PIL import Image
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.streams.mini import DOMAINS
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.train import *
from moe_merge_nb.baselines.zscl import *
def learner_of(clip, tokenizer, baseline, task=toy_stream()[0]):
    "A learner in the state in which callbacks meet it, `baseline` told."
    model = AdaptedCLIP(copy.deepcopy(clip), n_experts=0).eval()
    params = [p.requires_grad_(p is not model.logit_scale) for p in model.clip.parameters()]
    known = dict(optimizer=torch.optim.SGD(params[:-1], 1e-3), settings=Train(iterations=4, warmup=0), clip=clip)
    learner = Learner(model, task, 0, **known, tokenizer=tokenizer, tokens=tokenizer(prompts(task)))
    baseline.before_task(learner)
    return learner


def test_the_loss_is_zero_at_the_frozen_model_and_its_gradient_leads_back():
    clip, tokenizer = load_clip('toy', 'random')
    for texts in ('student', 'teacher'):
        zscl = ZSCL(n=24, batch=24, texts=texts)
        learner = learner_of(clip, tokenizer, zscl)
        assert zscl.loss(learner, *stack(learner.task.test)).item() < 1e-6
        with torch.no_grad():
            for p in learner.model.clip.parameters():
                if p.requires_grad: p.add_(.02 * torch.randn_like(p))
        losses = []
        for _ in range(8):
            loss = zscl.loss(learner, *stack(learner.task.test))
            learner.optimizer.zero_grad()
            loss.backward()
            learner.optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 1e-3 and losses[-1] < losses[0]


def test_the_weights_that_remain_are_the_mean_of_the_snapshots():
    class Snapshots(Callback):
        def before_task(self, learner): self.seen = [flat(learner)]
        def after_step(self, learner): self.seen += [flat(learner)] if learner.iteration % 3 == 0 else []
    def flat(learner): return torch.cat([p.detach().flatten() for p in learner.model.clip.parameters()])
    clip, tokenizer = load_clip('toy', 'random')
    model, look = AdaptedCLIP(copy.deepcopy(clip), n_experts=0).eval(), Snapshots()
    known = dict(settings=Train(iterations=10, batch=8, lr=1e-3, warmup=2), tune='backbone', clip=clip)
    learner = train_task(model, toy_stream()[0], 0, tokenizer, **known, callbacks=[look, ZSCL(every=3, n=16, batch=8)])
    assert len(look.seen) == 4
    torch.testing.assert_close(flat(learner), torch.stack(look.seen).mean(0))
    assert (flat(learner) - look.seen[-1]).abs().max() > 1e-4


def test_the_l2_term_counts_from_the_weights_before_the_task():
    clip, tokenizer = load_clip('toy', 'random')
    zscl = ZSCL(weight=0., l2=3., n=8, batch=8)
    learner = learner_of(clip, tokenizer, zscl)
    with torch.no_grad(): learner.model.clip.text_projection += .1
    torch.testing.assert_close(zscl.loss(learner, *stack(learner.task.test)), torch.tensor(3 * .01 * 32 * 32))


def test_a_folder_is_read_and_what_it_lacks_is_named():
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as d:
        with pytest.raises(ValueError, match='choose a folder of images'): reference(d, 4, 0, 32)
        for i in range(6): Image.new('RGB', (50, 40), (40 * i, 7, 99)).save(Path(d)/f'{i}.png')
        with pytest.raises(ValueError, match='captions.txt is missing'): reference(d, 4, 0, 32)
        (Path(d)/'captions.txt').write_text('one thing\n\nanother thing\n')
        images, captions = reference(d, 4, 0, 32)
        reds = {int(x[0, 0, 0]) for x in images.images}
        assert len(reds & {40 * i for i in range(6)}) == 4 and (images.images[:, 1] == 7).all()
        assert len(captions) == 4 and set(captions) == {'one thing', 'another thing'}
        assert torch.equal(images.images, reference(d, 4, 0, 32)[0].images)


def test_settings_stay_settings():
    zscl, (clip, tokenizer) = ZSCL(n=8, batch=4), load_clip('toy', 'random')
    mine = copy.deepcopy(zscl)
    learner_of(clip, tokenizer, mine)
    assert mine == zscl and asdict(mine) == asdict(zscl)
    assert len(mine.run.images) == 8 and zscl.run.images is None
    other = copy.deepcopy(mine)
    other.run.mean[0].zero_()
    assert not torch.equal(other.run.mean[0], mine.run.mean[0])
    with pytest.raises(ValueError, match='every is 0'): ZSCL(every=0)
    with pytest.raises(ValueError, match="texts is 'both'"): ZSCL(texts='both')
