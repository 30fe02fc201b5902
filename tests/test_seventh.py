"""A seventh system, added as a new user would: Soft MoE (arXiv 2308.00951) as one file of one's own.

Every expert has a slot. A slot reads a mean of tokens, the experts answer their slots, and every token takes a mean of
the answers. Adapted: a token's slots read only what came up to it. So a prompt does not depend on how far it is padded,
and an image not on its company."""
import sys
import pytest
import torch
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.tried import try_out
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.run.share import load, save
from toys import SMALL, ends_alike, whole_and_killed

FILE = '''
import torch
from torch import nn

class Slots(nn.Module):
    "What a task owns in a block: where each expert's slot looks."
    def __init__(self, width, n_experts):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(width, n_experts) / width**.5)

    def forward(self, x0, noisy=False): return x0 @ self.phi

def every(logits):
    "All experts run."
    return logits.softmax(-1)

def soft(x, route, experts):
    "Soft MoE: tokens into slots, experts on slots, answers back to tokens."
    route(x)                                                            # so that usage is counted
    logits = x @ route.own.phi                                          # (batch, tokens, experts)
    weight = (logits - logits.detach().amax((1, 2), keepdim=True)).clamp(min=-60).exp()[..., None]
    read = (weight * x[:, :, None]).cumsum(1) / weight.cumsum(1)        # (batch, tokens, experts, width)
    said = torch.stack([e(read[:, :, i]) for i, e in enumerate(experts)], dim=2)
    return (logits.softmax(-1)[..., None] * said).sum(2)
'''
SOFT = ['experts.router=my_slots.Slots', 'experts.gate=my_slots.every', 'experts.mix=my_slots.soft']


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory with the file."
    (tmp_path/'my_slots.py').write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop('my_slots', None)
    return tmp_path

def test_its_parts_pass_the_trial(here):
    try_out(Experts(n_experts=4, rank=2, router='my_slots.Slots', gate='my_slots.every', mix='my_slots.soft'))

def test_it_is_trained_killed_resumed_merged_and_shared(here):
    whole_and_killed([*SMALL, *SOFT])
    ends_alike()
    result = load_result('whole')
    assert sorted(result.config['sources']) == ['my_slots.Slots', 'my_slots.every', 'my_slots.soft']
    assert any(e['kind'] == 'merge' for e in result.events)
    model, x = load('whole', trust=True).model, torch.randn(2, 3, 32, 32)
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random'), trust=True).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
    tokens = torch.zeros(2, model.clip.context_length, dtype=torch.long)
    tokens[0, :3], tokens[1, :9] = torch.tensor([1, 5, 60]), torch.tensor([1, 5, 6, 7, 8, 9, 8, 7, 60])
    together, alone = model.encode_text(tokens, 1)[:1], model.encode_text(tokens[:1], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
