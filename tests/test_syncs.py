"""On a GPU nobody waits who need not: the counts of `cost.syncs`, and that nothing else changes where nobody waits."""
import pytest
import torch
from torch import nn
from moe_merge_nb.cost.syncs import Calls, Operations, Pretended, count, jobs, table
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_banked, mix_gathered, mix_loop, mix_segments
from moe_merge_nb.layer.moe import MoE, Route, mixture
from moe_merge_nb.layer.router import top_k_gates, top_p_gates
from moe_merge_nb.learn.learner import Learner
from moe_merge_nb.merge.usage import Usage
from moe_merge_nb.streams.tasks import stack, toy_stream
from toys import toy_model


def waits(run, *modules):
    "What is waited for, without who asks."
    found = {}
    for (*_, op), n in count(run, *modules).items(): found[op] = found.get(op, 0) + n
    return found

def pretending(run, module):
    "What `run` returns where the tensors of `module` are said to be on a device."
    device = Pretended([*module.parameters(), *module.buffers()])
    with Calls(device), Operations(device): return run()

def a_layer(**kinds):
    "A layer whose experts and router say something."
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(n_experts=5, rank=3, **kinds))
    moe.add_task()
    for w in moe.parameters(): nn.init.normal_(w)
    return moe.eval()


LAYER = nn.Linear(3, 3)
ASKED = {
    'item': (lambda w: w.sum().item(), {'a number': 1}),
    'float': (lambda w: float(w[0, 0]), {'a number': 1}),
    'if': (lambda w: 1 if (w > 0).any() else 0, {'a number': 1}),
    'list': (lambda w: w.tolist(), {'tolist': 1}),
    'list of one': (lambda w: w.sum().tolist(), {'tolist': 1}),
    'array': (lambda w: w.detach().numpy(), {'numpy': 1}),
    'copy': (lambda w: w.cpu(), {'a copy': 1}),
    'copy into': (lambda w: torch.zeros(3, 3).copy_(w.detach()), {'a copy': 1}),
    'mask': (lambda w: w[w > 0], {'boolean index': 1}),
    'fill': (lambda w: w.detach().clone()[w > 0].mul_(0), {'boolean index': 1}),
    'masked fill': (lambda w: w.detach().clone().__setitem__(w > 0, 0.), {}),
    'nonzero': (lambda w: (w > 0).nonzero(), {'nonzero': 1}),
    'unique': (lambda w: w.unique(), {'unique': 1}),
    'rows': (lambda w: w[torch.tensor([0, 2])], {}),
    'known on the processor': (lambda w: torch.ones(3).tolist() + [torch.ones(3).sum().item()], {}),
    'asked again': (lambda w: (c := w.cpu(), c.tolist(), c.sum().item()), {'a copy': 1}),
    'sent there': (lambda w: torch.ones(3).to(w.device).sum().item(), {'a number': 1}),
    'made there': (lambda w: torch.ones(3, device=w.device).sum().item(), {'a number': 1}),
    'computed': (lambda w: (w @ torch.ones(3)).relu().tolist(), {'tolist': 1}),
    'backward': (lambda w: [w.square().sum().backward(), w.grad.tolist()], {'tolist': 1}),
}

@pytest.mark.parametrize('name', ASKED)
def test_who_asks_for_a_number_waits_and_nobody_else(name):
    run, want = ASKED[name]
    assert waits(lambda: run(LAYER.weight), LAYER) == want


@pytest.fixture(scope='module')
def rows(): return table()

def test_one_per_block_in_training_none_per_batch_in_evaluation(rows):
    found = rows.groupby('job').waits.sum()
    model = jobs()['training iteration'][1]
    assert found['training iteration'] == len(model.moes) + 1                       # the loss is looked at
    assert 'batch of test images' not in found
    assert found['prompts of a task'] == 3


def test_who_asks_is_named(rows):
    rows = rows.set_index('job').loc[['training iteration']]
    assert sorted(zip(rows.function, rows.waits)) == [('layer.mix.mix_selected', 7), ('learn.train.step', 1)]
    assert rows.line.str.contains('cpu()', regex=False).sum() == 1


@pytest.mark.parametrize('kinds, want', [
    ({}, {}),
    (dict(gate='raw_top_k'), {}),
    (dict(gate='top_p'), {'a copy': 1}),                                            # the logits decide how many
    (dict(expert='gelu'), {'a copy': 1}),                                           # one after the other
])
def test_in_evaluation_only_who_cannot_know_waits(kinds, want):
    moe, x = a_layer(**kinds), torch.randn(6, 4, 8)
    with torch.no_grad(): assert waits(lambda: mixture(moe, x.to(moe.frozen.device), 0), moe) == want
    assert waits(lambda: mixture(moe, x.to(moe.frozen.device), 0).sum().backward(), moe) == {'a copy': 1}


def test_other_gates_of_a_pass_may_open_more():
    moe = a_layer()
    assert Route(moe, 0).most == 2 and Route(moe, 0, over=lambda m, h: h.softmax(-1)).most is None


def test_nothing_changes_without_a_list():
    moe, x = a_layer(), torch.randn(9, 4, 8)
    gates = top_k_gates(torch.randn(9, 5))
    gates[3] = torch.tensor([0., 0., 1., 0., 0.])                                   # a second gate underflowed
    assert torch.equal(mix_banked(x, gates, moe.experts, 2), mix_gathered(x, gates, moe.experts))
    want = mix_loop(x, gates, moe.experts)
    torch.testing.assert_close(mix_banked(x, gates, moe.experts, 4), want, rtol=1e-4, atol=1e-4)
    model, _ = toy_model()
    images = stack(toy_stream(1)[0].test)[0]
    def run():
        with torch.no_grad(): return model.encode_image(images.to(model.logit_scale.device), 0)
    torch.testing.assert_close(pretending(run, model), run(), rtol=1e-5, atol=1e-5)


def test_too_many_experts_are_not_stacked(monkeypatch):
    moe, x = a_layer(), torch.randn(6, 4, 8)
    monkeypatch.setattr('moe_merge_nb.layer.mix.BANK', 2*5*24*4 - 1)
    with torch.no_grad(): assert waits(lambda: mixture(moe, x.to(moe.frozen.device), 0), moe) == {'a copy': 1}


@pytest.mark.parametrize('mix', [mix_loop, mix_gathered, mix_segments])
def test_every_way_with_a_list_waits_once(mix):
    moe, x = a_layer(), torch.randn(6, 4, 8)
    def run():
        gates = top_p_gates(moe.routers[0](x[:, 0].to(moe.frozen.device)))
        return mix(x.to(moe.frozen.device), gates, moe.experts)
    assert waits(run, moe) == {'a copy': 1}


def test_counting_usage_waits_for_nothing_and_reading_it_once():
    model, _ = toy_model()
    images, usage = torch.randn(5, 3, 32, 32), Usage()
    def run():
        with torch.no_grad(): model.encode_image(images.to(model.logit_scale.device), 0, usage)
    assert waits(run, model) == {}
    learner = object.__new__(Learner)
    learner.usage, learner.accelerator = usage, None
    assert waits(learner.counts, *[holder(c) for c in usage.counts.values()]) == {'a copy': 1}
    assert {k: c.tolist() for k, c in learner.counts().items()} == {k: c.tolist() for k, c in usage.counts.items()}
    assert all(c.sum() == 2*5 for c in learner.counts().values())

def holder(t):
    "A module that has this tensor."
    m = nn.Module()
    m.register_buffer('t', t)
    return m
