"""What many tests need: one small adapted CLIP."""
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP


def toy_model(n_tasks=2, seed=0, **kinds):
    "An adapted pico whose adapters say something, random and not trained; its tokenizer."
    clip, tokenizer = load_clip('pico', 'random')
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AdaptedCLIP(clip, **{'n_experts': 4, 'rank': 4, 'scale': 1., **kinds})
        for _ in range(n_tasks): model.add_task()
        for m in model.moes:
            for e in m.experts: torch.nn.init.normal_(e.up.weight, std=.3)
            for w in m.routers.parameters(): torch.nn.init.normal_(w)
    return model.eval(), tokenizer
