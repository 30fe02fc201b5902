"""The best expert attends to the others: what the interaction layer computes, its losses, and that it trains."""
import math
from types import SimpleNamespace
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_loop, selected
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.layer.router import raw_top_k_gates
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.rewrites.bank import bank
from moe_merge_nb.run.share import load, save
from moe_merge_nb.variants.thoughts import (
    THOUGHTS, Thoughts, ThoughtsRouter, balance_loss, consistency_loss, entropy_loss, hidden)
from toys import SMALL, ends_alike, toy_model, whole_and_killed


def layer(new=False, **how):
    "A layer in evaluation, whose tensors are random but for a new interaction's."
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(**{'n_experts': 5, 'rank': 4, 'scale': .7, **THOUGHTS, **how})).eval()
    moe.add_task()
    for name, p in moe.named_parameters():
        if not (new and '.back.' in name): nn.init.normal_(p, std=.5)
    return moe

def x_of(n=6): return torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(1))

def plain(moe, x): return mix_loop(x, raw_top_k_gates(x[:, 0] @ moe.routers[0].gate, 3), moe.experts)


# ---- the interaction

def test_a_new_interaction_changes_nothing():
    moe, x = layer(new=True), x_of()
    torch.testing.assert_close(mixture(moe, x, 0), plain(moe, x), rtol=1e-5, atol=1e-6)

def test_a_token_is_answered_by_the_formula():
    moe, x = layer(options={'router': {'heads': 1}}), x_of()
    own, r = moe.routers[0], 4
    chosen, _ = selected(raw_top_k_gates(x[:, 0] @ own.gate, 3))
    W, b = own.attention.in_proj_weight.split(r), own.attention.in_proj_bias.split(r)
    i, t = 2, 3                                                                 # one token of one sequence
    h = torch.stack([moe.experts[e].hidden(x[i, t]) for e in chosen[i].tolist()])
    q, k, v = h[0] @ W[0].T + b[0], h @ W[1].T + b[1], h @ W[2].T + b[2]
    A = own.attention.out_proj((k @ q / math.sqrt(r)).softmax(0) @ v)
    want = plain(moe, x)[i, t] + .7 * own.back(F.layer_norm(h[0] + A, (r,), own.norm.weight, own.norm.bias))
    torch.testing.assert_close(mixture(moe, x, 0)[i, t], want, rtol=1e-4, atol=1e-5)

def test_bottlenecks_are_those_of_the_chosen_experts():
    moe, x, chosen = layer(), x_of(3), torch.tensor([[0, 3], [3, 3], [4, 0]])
    h = hidden(x, chosen, moe.experts)
    for i, row in enumerate(chosen.tolist()):
        for j, e in enumerate(row): torch.testing.assert_close(h[i, j], moe.experts[e].hidden(x[i]))

def test_the_order_of_the_others_does_not_matter_and_the_primary_does():
    own, h, all_open = layer().routers[0], torch.randn(2, 4, 5, 4), torch.ones(2, 4, dtype=torch.bool)
    y = own.interact(h, all_open)
    torch.testing.assert_close(own.interact(h[:, [0, 3, 1, 2]], all_open), y, rtol=1e-5, atol=1e-5)
    assert (own.interact(h[:, [1, 0, 2, 3]], all_open) - y).abs().max() > .1

def test_one_expert_attends_to_itself_and_that_is_not_nothing():
    own, h = layer().routers[0], torch.randn(2, 1, 5, 4)
    y = own.interact(h, torch.ones(2, 1, dtype=torch.bool))
    W, b = own.attention.in_proj_weight[-4:], own.attention.in_proj_bias[-4:]
    torch.testing.assert_close(y, own.back(own.norm(h[:, 0] + own.attention.out_proj(h[:, 0] @ W.T + b))))

def test_fillers_are_not_seen():
    own, h = layer().routers[0], torch.randn(2, 3, 5, 4)
    seen = own.interact(h, torch.tensor([[True, True, False]]*2))
    torch.testing.assert_close(seen, own.interact(h[:, :2], torch.ones(2, 2, dtype=torch.bool)))
    assert own.interact(h, torch.zeros(2, 3, dtype=torch.bool)).isfinite().all()

@pytest.mark.parametrize('gate', ['top_p', 'top_k'])
def test_every_gate_works_and_unused_experts_have_no_gradient(gate):
    moe, x, seen = layer(gate=gate, top_p=.5), x_of(2), []
    mixture(moe, x, 0, seen.append).square().sum().backward()
    used = (seen[0].gates > 0).any(0)
    assert [e.down.weight.grad is not None for e in moe.experts] == used.tolist()
    assert all(p.grad is not None for n, p in moe.routers[0].named_parameters() if n != 'noise')

def test_attention_over_the_primary_only_is_a_control():
    moe, alone = layer(), layer(options={'mix': {'others': False}})
    x, own = x_of(), alone.routers[0]
    chosen, _ = selected(raw_top_k_gates(x[:, 0] @ own.gate, 3))
    h = hidden(x, chosen[:, :1], alone.experts)
    want = plain(alone, x) + .7 * own.interact(h, torch.ones(len(x), 1, dtype=torch.bool))
    torch.testing.assert_close(mixture(alone, x, 0), want)
    assert (mixture(moe, x, 0) - want).abs().max() > .1

def test_what_a_prompt_says_does_not_depend_on_the_others():
    model, tokenizer = toy_model(**THOUGHTS)
    short, both = tokenizer(['a cat']), tokenizer(['a cat', 'a photo of the sea at night, with a ship.'])
    torch.testing.assert_close(model.encode_text(both, 1)[:1], model.encode_text(short, 1), rtol=1e-3, atol=1e-4)


# ---- the losses

def test_the_losses_are_zero_where_there_is_nothing_to_mend():
    even, one = torch.zeros(6, 4), torch.tensor([[60., 0., 0., 0.]]*6)
    assert abs(entropy_loss(even)) < 1e-6 and abs(entropy_loss(one) - 1) < 1e-6
    assert balance_loss(torch.eye(4)) == 0 and abs(balance_loss(one.softmax(1)) - 3) < 1e-6
    assert consistency_loss(one, one) == 0 and consistency_loss(one, even, T=1.) > .5

def test_entropy_of_a_router_with_closed_experts_is_that_of_the_others():
    h = torch.tensor([[.3, -.2, -torch.inf, 1.]], requires_grad=True)
    P = h[:, [0, 1, 3]].softmax(1)
    torch.testing.assert_close(entropy_loss(h), 1 + (P * P.log()).sum() / math.log(4))
    entropy_loss(h).backward()
    assert h.grad[0, [0, 1, 3]].isfinite().all() and h.grad[0, 2] == 0

def test_the_callback_adds_them_for_images_with_gradients():
    moe, seen, loss = layer(), [], Thoughts(entropy=.5, balance=.25, consistency=.125)
    mixture(moe, x_of(), 0, seen.append)
    learner, [r] = SimpleNamespace(model=SimpleNamespace(moes=[moe])), seen
    found = loss.routing_loss(learner, seen)                                    # without noise: consistent
    torch.testing.assert_close(found, .5*entropy_loss(r.logits) + .25*balance_loss(r.gates))
    found.backward()
    assert moe.routers[0].gate.grad.abs().max() > 0
    assert loss.routing_loss(learner, [r._replace(tower='text')]) is None
    moe.train()
    noisy = loss.routing_loss(learner, seen)
    assert noisy > found.detach()

# ---- as a method

def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="kind Router, which has no interaction layer"):
        mixture(layer(router='noisy'), x_of(), 0)
    with pytest.raises(ValueError, match='heads is 3: choose a divisor'): ThoughtsRouter(8, 5, 4, heads=3)
    with pytest.raises(ValueError, match='baseline.entropy is -1'): Thoughts(entropy=-1)
    with pytest.raises(ValueError, match='rewrites know .* the routers noisy only'): bank(layer())
    silent = SimpleNamespace(named_parameters=lambda: [])
    with pytest.raises(ValueError, match='SimpleNamespace has none'): hidden(x_of(), torch.zeros(6, 1).long(), [silent])

def test_the_recipe_is_trained_killed_resumed_and_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ['baseline.entropy=.02']
    whole_and_killed(['method=thoughts', *SMALL[1:], *chosen])
    ends_alike()
    assert load_result('whole').config['baseline']['entropy'] == .02
    model, x = load('whole').model, torch.randn(2, 3, 32, 32)
    assert model.moes[0].routers[1].back.weight.any()                           # the interaction has learned
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))

def test_the_recipe_is_a_method():
    m = method('thoughts')
    assert m.baseline == Thoughts() and m.experts.top_k == 3 and m.freeze == method('moe').freeze
