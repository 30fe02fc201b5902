"""A plain formulation of the mixture: one stacked matrix per sequence. What is fast is compared with it."""
import torch
from torch import nn, Tensor
from moe_merge_nb.layer.mix import selected


def mix_stacked(
    x:Tensor, # (batch, tokens, width)
    gates:Tensor, # (batch, experts)
    experts:nn.ModuleList, # of `Expert`
)->Tensor: # (batch, tokens, width)
    "The mixture with the selected experts side by side: equal to `mix_loop`, at the cost of the distinct experts."
    chosen, weights = selected(gates)                                       # (batch, k)
    used, place = chosen.unique(return_inverse=True)                        # (used,), (batch, k)
    used, place = [experts[e] for e in used.tolist()], place.to(x.device)
    down = torch.stack([e.down.weight for e in used])[place].flatten(1, 2)                  # (batch, k*r, d)
    up = torch.stack([e.up.weight.T for e in used])[place].flatten(1, 2)                    # (batch, k*r, d)
    b_down = torch.stack([e.down.bias for e in used])[place].flatten(1)                     # (batch, k*r)
    b_up = torch.stack([e.up.bias for e in used])[place]                                    # (batch, k, d)
    weights = weights * used[0].scale
    hidden = torch.baddbmm(b_down[:, None], x, down.mT).relu()                              # (batch, tokens, k*r)
    hidden = used[0].dropout(hidden) * weights.repeat_interleave(used[0].down.out_features, 1)[:, None]
    return torch.baddbmm((weights[..., None] * b_up).sum(1, keepdim=True), hidden, up)
