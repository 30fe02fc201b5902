"""Experts in steps: what a chain computes, what each router of it learns, and that it trains as any other layer."""
import pytest
import torch
from torch import nn
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.adapt import AdaptedCLIP, trainable
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_loop
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.layer.router import raw_top_k_gates, top_k_gates
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.merge.rule import rewrite_column
from moe_merge_nb.rewrites.bank import bank
from moe_merge_nb.run.share import load, save
from moe_merge_nb.variants.chain import CASES, CHAIN, ChainRouter
from toys import SMALL, ends_alike, toy_model, whole_and_killed


def layer(**how):
    "A layer with random tensors, in evaluation."
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(**{'n_experts': 4, 'rank': 3, 'scale': 1., **CHAIN, **how})).eval()
    moe.add_task()
    for p in moe.parameters(): nn.init.normal_(p, std=.5)
    return moe

def x_of(n=6): return torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(1))


# ---- the gate

def test_raw_gates_are_the_largest_masses_as_they_are():
    h = torch.randn(50, 7)
    gates, P = raw_top_k_gates(h, 3), h.softmax(1)
    assert (gates > 0).sum(1).eq(3).all() and (gates.sum(1) < 1).all()
    assert torch.equal(gates[gates > 0], P[gates > 0]) and (gates.amax(1) == P.amax(1)).all()
    torch.testing.assert_close(gates / gates.sum(1, keepdim=True), top_k_gates(h, 3))
    assert raw_top_k_gates(torch.zeros(1, 4), 2).tolist() == [[.25, .25, 0, 0]]
    torch.testing.assert_close(raw_top_k_gates(h, 7), P)

@pytest.mark.parametrize('k', [0, 5])
def test_raw_gates_refuse_a_number_of_experts_there_is_not(k):
    with pytest.raises(ValueError, match=f'top_k is {k}, but'): raw_top_k_gates(torch.zeros(1, 4), k)

@pytest.mark.parametrize('gate, learns', [('raw_top_k', True), ('top_k', False)])
def test_the_routers_of_a_chain_learn_only_where_the_softmax_comes_first(gate, learns):
    moe = layer(gate=gate)
    mixture(moe, x_of(), 0).square().sum().backward()
    for step in moe.routers[0].steps: assert bool(step.gate.grad.abs().max() > 1e-6) is learns


# ---- the chain

def test_two_steps_are_their_formula():
    moe, x = layer(), x_of()
    first, second = moe.routers[0].steps
    run = lambda x, router: mix_loop(x, raw_top_k_gates(x[:, 0] @ router.gate, 1), moe.experts)
    x_1 = x + run(x, first)
    x_2 = x_1 + run(x_1, second)
    torch.testing.assert_close(mixture(moe, x, 0), x_2 - x, rtol=1e-5, atol=1e-5)

def test_the_second_step_is_routed_by_what_the_first_has_made():
    moe, x, seen = layer(), x_of(), []
    mixture(moe, x, 0, seen.append)
    y_1 = mix_loop(x, seen[0].gates, moe.experts)
    assert len(seen) == 2 and torch.equal(seen[0].x, x)
    torch.testing.assert_close(seen[1].x, x + y_1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1].logits, seen[1].x[:, 0] @ moe.routers[0].steps[1].gate)

def test_one_step_is_the_plain_layer():
    moe = layer(options={'router': {'steps': 1}})
    plain = layer(router='noisy', mix='once')
    plain.experts.load_state_dict(moe.experts.state_dict())
    plain.routers[0].load_state_dict(moe.routers[0].steps[0].state_dict())
    assert torch.equal(mixture(moe, x_of(), 0), mixture(plain, x_of(), 0))

@pytest.mark.parametrize('steps', [1, 2, 4])
def test_a_new_chain_adds_nothing_however_long(steps):
    moe = MoE('image', 0, 8, Experts(4, 3, **CHAIN, options={'router': {'steps': steps}}))
    moe.add_task()
    assert torch.equal(mixture(moe, x_of(), 0), torch.zeros_like(x_of()))

def test_each_further_step_trains_two_tensors_more_in_every_block():
    clip = toy_model()[0].clip
    def opened(steps):
        model = AdaptedCLIP(clip, Experts(4, 2, **CHAIN, options={'router': {'steps': steps}}))
        model.add_task()
        return len(trainable(model)), len(model.moes)
    (one, blocks), (two, _), (four, _) = map(opened, (1, 2, 4))
    assert two - one == 2*blocks and four - one == 6*blocks

def test_one_router_can_serve_all_steps():
    moe, x, seen = layer(options={'router': {'shared': True}}), x_of(), []
    mixture(moe, x, 0, seen.append)
    [router] = moe.routers[0].steps
    for s in seen: assert torch.equal(s.logits, router(s.x[:, 0]))
    assert len(seen) == 2 and not torch.equal(seen[0].logits, seen[1].logits)

def test_prompts_of_one_task_have_one_route_in_each_step():
    model, tokenizer = toy_model(**CHAIN)
    seen = []
    model.encode_text(tokenizer(['a photo of a cat.', 'a bird', 'the sea at night']), 1, seen.append)
    assert [s.block for s in seen] == [b for b in range(len(seen)//2) for _ in range(2)]
    for s in seen: torch.testing.assert_close(s.logits, s.logits[:1].expand(3, -1), rtol=1e-4, atol=1e-4)
    tree = model.encode_prompts(tokenizer(['a bird', 'a cat']), 1)
    assert torch.equal(tree, model.encode_text(tokenizer(['a bird', 'a cat']), 1))


# ---- as a kind of router

def test_a_closed_expert_is_selected_in_no_step():
    moe, seen = layer(), []
    moe.routers[0].closed[[0, 2]] = True
    mixture(moe, x_of(20), 0, seen.append)
    assert all(not s.gates[:, [0, 2]].any() and s.gates.any(1).all() for s in seen)

def test_a_merge_that_writes_a_column_writes_it_in_every_step():
    router = layer().routers[0]
    with torch.no_grad(): rewrite_column(router, 0, [1], 'mean')
    for step in router.steps: assert torch.equal(step.gate[:, 0], step.gate[:, 1])

def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="kind Router, which has no steps: choose experts.router='chain'"):
        mixture(layer(router='noisy'), x_of(), 0)
    with pytest.raises(ValueError, match='router.steps is 0'): ChainRouter(8, 4, steps=0)
    with pytest.raises(ValueError, match='rewrites know .* the routers noisy only'): bank(layer())


# ---- as a method

def test_the_recipe_is_a_method():
    m = method('chain')
    assert m.experts.top_k == 1 and (m.experts.router, m.experts.mix) == ('chain', 'chain')
    assert m.freeze == method('moe').freeze and m.train == method('moe').train

def test_equal_expert_calls_are_equal():
    calls = {}
    for case, how in CASES.items():
        moe, seen = layer(**{'router': 'noisy', 'mix': 'once', **how, 'rank': 3}), []
        mixture(moe, x_of(), 0, seen.append)
        calls[case] = sum(int((s.gates > 0).sum()) for s in seen) // 6
    assert calls == {c: 1 if '1' in c.split() and 'sum' not in c else 2 for c in CASES}

def test_a_chain_merges_and_is_saved_killed_resumed_and_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ['experts.router=chain', 'experts.mix=chain', 'experts.gate=raw_top_k', 'experts.top_k=1']
    chosen.append('selectors=[oracle]')
    whole_and_killed([*SMALL, *chosen])
    ends_alike()
    assert any(e['kind'] == 'merge' for e in load_result('whole').events)
    model, x = load('whole').model, torch.randn(2, 3, 32, 32)
    assert type(model.moes[0].routers[1]) is ChainRouter
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
