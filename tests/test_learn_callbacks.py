import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import *
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import *
from moe_merge_nb.learn.callbacks import *
def trained(rule, n_tasks=1, callbacks=(), iterations=16):
    "A small model after `n_tasks` toy tasks under `rule`, with its learners and the callback."
    clip, tokenizer = load_clip('toy', 'random')
    torch.manual_seed(0)
    model, merge = AdaptedCLIP(clip, n_experts=6, rank=4), MergeMostUsed(rule)
    learners = []
    for t, task in enumerate(toy_stream(n_tasks)):
        model.add_task()
        settings = Train(iterations=iterations, batch=8, lr=1e-2, warmup=2)
        around = [merge, FreezeMostUsed(), *callbacks]
        learners.append(train_task(model, task, t, tokenizer, settings=settings, callbacks=around))
    return model, learners, merge


def test_every_block_merges_at_the_planned_iterations():
    model, learners, _ = trained(Merge(every=4))
    merges = [e for e in learners[0].events if e['kind'] in ('merge', 'no_merge')]
    assert {e['iteration'] for e in merges} == {4, 8, 12} and len(merges) == 3 * 2
    assert all(e['target'] not in e['sources'] for e in merges)


def test_a_fitted_merge_sees_what_the_blocks_read_and_training_goes_on_as_it_would():
    class Look(Callback):
        def after_step(self, learner):
            if learner.iteration != 5: return
            before, self.x = torch.get_rng_state(), tokens_read(learner, images=4, tokens=50)
            self.same = torch.equal(before, torch.get_rng_state()) and learner.model.training
    look = Look()
    model, _, _ = trained(Merge(every=4, fit=True, start='merged'), n_tasks=2, callbacks=[look], iterations=8)
    assert look.same and set(look.x) == {(m.tower, m.block) for m in model.moes}
    assert all(x.shape[1] == m.width and 0 < len(x) <= 50 for m, x in zip(model.moes, look.x.values()))
    plain, _, _ = trained(Merge(every=4, start='merged'), n_tasks=2, iterations=8)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))


def test_the_window_starts_at_the_last_merge():
    for window, sums in (('since_last', [64, 64, 64]), ('task', [64, 128, 192])):
        _, learners, _ = trained(Merge(every=4, window=window))
        merges = [e for e in learners[0].events if e['kind'] != 'freeze' and (e['tower'], e['block']) == ('image', 0)]
        assert [sum(e['counts']) for e in merges] == sums


def test_the_moments_of_the_target_are_forgotten_and_only_those():
    class Look(Callback):
        def after_step(self, learner):
            if learner.iteration != 12: return
            for e, moe in zip([e for e in learner.events if e['iteration'] == 12], learner.model.moes):
                has = [[p in learner.optimizer.state for p in x.parameters()] for x in moe.experts]
                assert not any(has[e['target']]) and all(all(has[s]) for s in e['sources'])
                self.looked = True
    look = Look()
    trained(Merge(every=12), callbacks=[look])
    assert look.looked


def test_frozen_experts_are_never_overwritten_during_training():
    class Watch(Callback):
        def before_task(self, learner):
            self.kept = [(m.experts[e], read(m.experts[e])) for m in learner.model.moes for e in m.frozen.nonzero()]
        def after_task(self, learner):
            same = [torch.equal(t, read(expert)[n]) for expert, s in self.kept for n, t in s.items()]
            self.ok = all(same) and len(same) > 0
    watch = Watch()
    trained(Merge(every=3), n_tasks=2, callbacks=[watch], iterations=8)
    assert watch.ok


def test_protect_spares_the_experts_of_finished_tasks():
    _, learners, merge = trained(Merge(every=3, protect=True), n_tasks=2, iterations=8)
    events = [e for e in learners[1].events if e['kind'] == 'merge']
    first_task = trained(Merge(every=3, protect=True), n_tasks=1, iterations=8)[2].protected
    assert all(e['target'] not in first_task[e['tower'], e['block']] for e in events)
    assert all(first_task.values())
