import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.router import top_k_gates
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.train import *
quick = Train(iterations=12, batch=8, lr=1e-2, warmup=2)
def small_model():
    "A small adapted random pico and its tokenizer."
    clip, tokenizer = load_clip('toy', 'random')
    torch.manual_seed(0)
    model = AdaptedCLIP(clip, n_experts=6, rank=4)
    model.add_task()
    return model, tokenizer


def test_the_same_seed_trains_the_same_weights():
    def weights(seed):
        model, tokenizer = small_model()
        torch.manual_seed(seed + 99)                    # the caller's random state must not matter
        train_task(model, toy_stream()[0], 0, tokenizer, quick, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.moes.parameters()])
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_frozen_experts_and_the_backbone_are_bit_identical_after_a_task():
    model, tokenizer = small_model()
    for m in model.moes:
        m.freeze([0, 3])
        for p in m.experts.parameters(): torch.nn.init.normal_(p)
    closed = {n: p.clone() for n, p in model.named_parameters() if n.startswith('clip.')}
    experts = [m.experts[e] for m in model.moes for e in (0, 3)]
    frozen = [(e, {n: p.clone() for n, p in e.named_parameters()}) for e in experts]
    learner = train_task(model, toy_stream()[0], 0, tokenizer, quick)
    assert all(c[0] > 0 for c in learner.usage.counts.values())
    assert all(torch.equal(p, closed[n]) for n, p in model.named_parameters() if n in closed)
    assert all(torch.equal(p, before[n]) for expert, before in frozen for n, p in expert.named_parameters())


def test_unselected_experts_do_not_move():
    model, tokenizer = small_model()
    for m in model.moes: m.gate = lambda h: top_k_gates(h.index_fill(1, torch.tensor([2, 5]), -1e9), 2)
    unused = [p for m in model.moes for e in (2, 5) for p in m.experts[e].parameters()]
    before = [p.clone() for p in unused]
    train_task(model, toy_stream()[0], 0, tokenizer, settings=Train(iterations=5, batch=8, warmup=0, weight_decay=0.))
    assert all(map(torch.equal, before, unused))


def test_usage_counts_every_sequence_of_the_task():
    model, tokenizer = small_model()
    usage = train_task(model, toy_stream()[0], 0, tokenizer, settings=quick).usage
    each = dict(image=8, text=3) # images of a batch, prompts
    assert all(c.sum() == 2 * 12 * each[tower] for (tower, _), c in usage.counts.items())


def test_micro_batches_add_up_to_the_batch():
    def trained(**kw):
        model, tokenizer = small_model()
        for m in model.moes:
            for e in m.experts: e.dropout.p = 0.
            m.gate = lambda h: top_k_gates(h.detach() * 0 + torch.arange(6.), 2) # no noise in the choice
        settings = Train(iterations=6, batch=9, lr=1e-2, warmup=2, **kw)
        train_task(model, toy_stream()[0], 0, tokenizer, settings=settings)
        return torch.cat([p.detach().flatten() for p in model.moes.parameters()])
    whole, pieces = trained(), trained(micro_batch=4)
    assert (whole - pieces).abs().max() < 1e-5 < (whole - trained(label_smoothing=0.)).abs().max()


def test_half_precision_learns_the_same_task_and_keeps_fp32_weights():
    model, tokenizer = small_model()
    losses = []
    class Watch(Callback):
        def after_step(self, learner): losses.append(learner.loss)
    settings = Train(iterations=25, batch=16, lr=1e-2, warmup=3, precision='bf16')
    train_task(model, toy_stream()[0], 0, tokenizer, settings=settings, callbacks=[Watch()])
    assert losses[-1] < losses[0] and {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_callback_can_add_to_the_loss():
    def squares(model): return sum(e.up.weight.square().sum() for m in model.moes for e in m.experts)
    class Shrink(Callback):
        def loss(self, learner, images, labels): return squares(learner.model)
    def size(callbacks):
        model, tokenizer = small_model()
        train_task(model, toy_stream()[0], 0, tokenizer, settings=quick, callbacks=callbacks)
        return squares(model).item()
    assert size([Shrink()]) < .9 * size([])


def test_a_task_goes_on_from_any_iteration_bit_for_bit():
    import tempfile
    from moe_merge_nb.safe.checkpoint import read_tree, write_tree
    task = toy_stream()[0]
    class Keep(Callback):
        def __init__(self, path): self.path = path
        def after_step(self, learner):
            kept = dict(snapshot=snapshot(learner, []), weights=dict(learner.model.moes.state_dict()))
            write_tree(kept, f'{self.path}/{learner.iteration}')
    for more in (dict(), dict(workers=1), dict(precision='bf16')):
        settings = Train(**{**vars(quick), 'iterations': 6, **more})
        with tempfile.TemporaryDirectory() as d:
            model, tokenizer = small_model()
            straight = train_task(model, task, 0, tokenizer, settings=settings, callbacks=[Keep(d)], seed=3)
            for i in (1, 4):
                saved = read_tree(f'{d}/{i}')
                again, _ = small_model()
                again.moes.load_state_dict(saved['weights'])
                torch.rand(i)                           # the caller's random state must not matter
                learner = train_task(again, task, 0, tokenizer, settings=settings, seed=3, saved=saved['snapshot'])
                assert all(map(torch.equal, model.parameters(), again.parameters())), (more, i)
                counts = learner.usage.counts
                assert all(torch.equal(c, counts[key]) for key, c in straight.usage.counts.items())
                assert learner.iteration == 6


def test_a_callback_that_does_not_say_what_it_keeps_is_not_continued_midway():
    class Adds(Callback):
        def loss(self, learner, images, labels): return None
    class Counts(Callback):
        def after_step(self, learner): self.n = learner.iteration
    class Says(Counts):
        def snapshot(self): return dict(n=self.n)
        def resume(self, learner, snapshot): self.n = snapshot['n']
    model, tokenizer = small_model()
    says = Says()
    short = Train(iterations=2, batch=4, warmup=1)
    learner = train_task(model, toy_stream()[0], 0, tokenizer, settings=short, callbacks=[says])
    assert snapshot(learner, [Adds(), says])['callbacks'] == [{}, dict(n=2)]
    assert snapshot(learner, [Adds(), Counts()]) is None


def test_a_loss_that_is_no_number_stops_the_task_before_the_step():
    class Explode(Callback):
        def __init__(self, value): self.value = value
        def loss(self, learner, images, labels): return torch.tensor(self.value if learner.iteration == 3 else 0.)
    class Watch(Callback):
        def after_step(self, learner):
            self.kept = snapshot(learner, []), [p.clone() for p in learner.model.parameters()]
        def before_failure(self, learner): self.last = snapshot(learner, [])
    def same(a, b):
        if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    from moe_merge_nb.safe.batches import batch_indices
    for value in (float('nan'), float('inf')):
        model, tokenizer = small_model()
        watch = Watch()
        said = (f"the loss is {value} in iteration 4 of task 'squares', at learning rate 0.00[0-9]*, "
                'for the images .[0-9, ]*. of its training set')
        with pytest.raises(FloatingPointError, match=said) as e:
            train_task(model, toy_stream()[0], 0, tokenizer, settings=quick, callbacks=[Explode(value), watch])
        assert str(list(batch_indices(48, 8, 12, 0))[3]) in str(e.value)
        assert same(watch.kept[0], watch.last)
        assert all(map(torch.equal, model.parameters(), watch.kept[1]))
