import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.cost.profile import *
from moe_merge_nb.streams.tasks import toy_stream


def test_the_backward_pass_belongs_to_where_the_forward_pass_was():
    from torch.profiler import ProfilerActivity, profile, record_function
    big, small = torch.randn(400, 400, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    def both(inside, outside):
        with record_function('experts'): y = inside @ inside
        return (y.sum() + (outside @ outside).sum()).backward()
    def share(inside, outside):
        both(inside, outside)
        with profile(activities=[ProfilerActivity.CPU]) as p: both(inside, outside)
        spent = parts(p.events())
        return spent.experts / (spent.experts + spent.products)
    assert share(big, small) > .8 and share(small, big) < .2


def test_names_are_taken_away_again():
    from moe_merge_nb.layer.adapt import AdaptedCLIP
    from moe_merge_nb.learn.settings import Train
    from moe_merge_nb.learn.train import train_task
    clip, tokenizer = load_clip()
    model = AdaptedCLIP(clip, n_experts=4, rank=4)
    model.add_task()
    before = [moe.mix for moe in model.moes]
    short = Train(iterations=2, batch=8, warmup=0)
    learner = train_task(model, toy_stream()[0], 0, tokenizer, settings=short, callbacks=[Names()])
    assert [moe.mix for moe in model.moes] == before and isinstance(learner.usage, NamedUsage)
    assert len(learner.usage.counts) == len(before)


def test_a_frame_belongs_to_the_outermost_phase_and_loading_to_itself():
    import sys, types
    def evaluate(): return phase(sys._getframe())
    def train_task(inner): return inner()
    assert evaluate() == 'evaluation' and train_task(evaluate) == 'training' and phase(sys._getframe()) == 'the rest'
    code = compile('def f(phase, sys): return phase(sys._getframe())', 'dataloader.py', 'exec')
    loading = types.FunctionType(code.co_consts[0], {})
    assert train_task(lambda: loading(phase, sys)) == 'data'
