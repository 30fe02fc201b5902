import copy
import numpy as np
import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.loss import *
from moe_merge_nb.learn.train import *
from moe_merge_nb.baselines.icarl import *
def taught(baseline, n_tasks=3, callbacks=(), **kw):
    "A random pico after some toy tasks, and the length of every list of the memory after each."
    toy, (clip, tokenizer) = toy_stream(n_tasks), load_clip('toy', 'random')
    model, sizes = AdaptedCLIP(copy.deepcopy(clip), n_experts=0).eval(), []
    settings = Train(**dict(dict(iterations=4, batch=8, lr=5e-4, warmup=1), **kw))
    known = dict(settings=settings, tune='backbone', callbacks=[baseline, *callbacks], clip=clip)
    for j, task in enumerate(toy):
        train_task(model, task, j, tokenizer, **known, seed=j, seen=toy.tasks[:j])
        sizes.append([[len(c) for c in t] for t in baseline.memory])
    return toy, model, sizes


def test_herding_is_the_greedy_search_written_out():
    def brute(features, m):
        phi = [f / f.norm() for f in features]
        mu, chosen = sum(phi) / len(phi), []
        far = lambda taken: float((mu - sum(phi[j] for j in taken) / len(taken)).norm())
        while len(chosen) < m:
            rest = [i for i in range(len(phi)) if i not in chosen]
            chosen.append(min(rest, key=lambda i: far([*chosen, i])))
        return chosen
    torch.manual_seed(0)
    for n in (1, 7, 20):
        f = torch.randn(n, 5).double()
        assert herding(f, 6) == brute(f, min(6, n)) == herding(f, 3)[:3] + brute(f, min(6, n))[3:]


def test_the_memory_stays_within_its_budget_and_holds_the_right_classes():
    icarl = ICaRL(memory_size=20, batch=6)
    toy, model, sizes = taught(icarl)
    assert sizes == [[[6, 6, 6]], [[3, 3, 3]] * 2, [[2, 2, 2]] * 3]
    for task, memory in zip(toy, icarl.memory):
        for c, chosen in enumerate(memory): assert all(task.train[i][1] == c for i in chosen)
    too_small = 'memory_size is 5 for the 6 classes up to task .circles.: choose at least 6'
    with pytest.raises(ValueError, match=too_small): taught(ICaRL(memory_size=5), 2)


def test_old_exemplars_are_shown_and_remembered():
    def old_loss(baseline):
        toy, model, _ = taught(baseline, 2, iterations=25, batch=12)
        x, y = stack(toy[0].train)
        _, tokenizer = load_clip('toy', 'random')
        with torch.no_grad():
            texts = model.encode_text(tokenizer(prompts(toy[0])))
            logits = class_logits(model.encode_image(x), texts, model.logit_scale)
        return torch.nn.functional.cross_entropy(logits, y).item()
    assert old_loss(ICaRL(18, batch=9)) < .9 * old_loss(ICaRL(18, batch=9, rehearsal=0., weight=0.))


def test_a_restored_memory_goes_on_as_if_nothing_had_happened():
    import json
    first, second = ICaRL(18, batch=6), ICaRL(18, batch=6)
    taught(first, 2)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.memory == first.memory and second == ICaRL(18, batch=6) and ICaRL(18, batch=6).memory == []
    other = copy.deepcopy(first)
    other.memory[0][0].clear()
    assert first.memory[0][0]


def test_processes_share_the_exemplars_of_an_iteration():
    from types import SimpleNamespace
    icarl = ICaRL(memory_size=12, batch=6)
    icarl.run.known = [(0, i) for i in range(12)]
    torch.manual_seed(3)
    def draw(n, i, it=5):
        process = SimpleNamespace(num_processes=n, process_index=i)
        return icarl.drawn(SimpleNamespace(iteration=it, accelerator=process))
    assert draw(1, 0) == draw(2, 0) + draw(2, 1) and len(set(draw(1, 0))) == 6 and draw(1, 0) != draw(1, 0, it=6)
    torch.rand(7)  # what was drawn in between does not matter
    assert draw(1, 0) == draw(2, 0) + draw(2, 1)


def test_micro_batches_count_the_exemplars_once():
    flat = lambda model: torch.cat([p.detach().flatten() for p in model.clip.parameters()])
    after = lambda r, m: flat(taught(ICaRL(12, batch=6, rehearsal=r), 2, iterations=2, micro_batch=m)[1])
    whole, pieces, without = after(1., None), after(1., 3), after(0., None)
    assert (whole - pieces).abs().mean() < .05 * (whole - without).abs().mean()
