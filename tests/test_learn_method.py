from dataclasses import replace
import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.baselines.lwf import LwF
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.learn.learner import *
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.callbacks import *
from moe_merge_nb.learn.checks import *
from moe_merge_nb.learn.method import *


def test_a_method_refuses_what_cannot_be():
    with pytest.raises(ValueError, match='rank is 0'): Method('m', experts=dict(rank=0))
    with pytest.raises(ValueError, match='top_k is 3, but there are 2 experts'):
        Method('m', experts=dict(n_experts=2, top_k=3))
    with pytest.raises(ValueError, match='tune is'): Method('m', tune='backbone')
    with pytest.raises(ValueError, match='selector'): Method('m', selectors=('psychic',))
    for classes in ('all', (), ('task', 'union')):
        with pytest.raises(ValueError, match="classes is .*: name 'task', 'all' or both"): Method('m', classes=classes)
    with pytest.raises(ValueError, match="it is for tune = .backbone."): Method("m", baseline=LwF())
    with pytest.raises(ValueError, match="a head looks at the frozen model"): Method('m', head=object())
    with pytest.raises(TypeError, match='experts_'): Method('m', experts=dict(experts_=2))


def test_classes_that_the_model_reads_alike_are_refused():
    _, tokenizer = load_clip('toy', 'random')
    def named(*classes):
        [first] = toy_stream(1)
        return Stream('words', (first, replace(first, name='pets', classes=classes)))
    check_words(named('cat', 'dog', 'cats'), tokenizer)
    for a, b in (('Cat', 'cat'), ('a  cat', 'a cat'), ('very ' * 30 + 'small cat', 'very ' * 30 + 'large cat')):
        message = f"task 'pets': the model reads the classes '{a}' and '{b}' as the same 20 tokens .*: rename one"
        with pytest.raises(ValueError, match=message): check_words(named(a, 'dog', b), tokenizer)


def test_what_a_kind_of_expert_cannot_do_is_refused_before_training():
    for change, message in ((dict(merge=Merge(align=True)), 'merge.align is true with experts.expert'),
                            (dict(merge=Merge(combine='ties')), 'experts.shared_init=true')):
        method = Method('m', experts=Experts(n_experts=4, rank=2, expert='gelu'), **change)
        with pytest.raises(ValueError, match=message): check(method, toy_stream(2))
    class Linear(torch.nn.Linear):
        def forward(self, x0, noisy=False): return super().forward(x0)
    open_only = Experts(n_experts=4, rank=2, router=lambda width, n_experts: Linear(width, n_experts))
    with pytest.raises(ValueError, match='freeze.settle is 0.5 with experts.router=.*cannot be closed'):
        check(Method('m', experts=open_only, freeze=FreezeMostUsed(settle=.5)), toy_stream(2))


def test_what_could_not_be_learned_is_refused_before_training():
    from types import SimpleNamespace
    from moe_merge_nb.baselines.methods import METHODS
    def changed(name, **fields): return replace(METHODS[name], **fields)
    def head(name, **fields): return changed(name, head=replace(METHODS[name].head, **fields))
    forgetful = replace(METHODS['icarl'].baseline, memory_size=5)
    three = SimpleNamespace(num_processes=3, process_index=0)
    for message, method, stream, processes in (
        ("task 'squares' has 3 training images", METHODS['moe'], toy_stream(2, n_train=3), None),
        ('icarl.memory_size is 5', changed('icarl', baseline=forgetful), toy_stream(2), None),
        ('zscl.every is 15', changed('zscl', train=Train(iterations=10, warmup=1)), toy_stream(2), None),
        ('96 images.*limit is 50', head('rail_kernel', most=50), toy_stream(2), None),
        ('train.batch is 32 for 3 processes', METHODS['moe'], toy_stream(2), three),
    ):
        with pytest.raises(ValueError, match=message): check(method, stream, processes)
    for m in METHODS.values(): check(m, toy_stream(2))
