"""Rows of nbs/10_strategies/02_confidence: python tools/measure_confidence.py RUNS FILE

RUNS is a folder of runs of the miniature: moe-merge method=moe seed=S data_seed=S hydra.run.dir=RUNS/S, for some S.
FILE is a CSV (seed, routers, images, what, number, weight, accuracy), written after every run; what it has is not
measured again. A minute and a half for a run, on one core."""
import sys
from collections.abc import Callable
from pathlib import Path
import pandas as pd
import torch
from torch import nn, Tensor
from moe_merge_nb.safe.doors import accepted
from moe_merge_nb.safe.files import replacing
from moe_merge_nb.strategies.afterwards import held_out, known_in, opened, views
from moe_merge_nb.strategies.confidence import (
    DISPERSIONS, LOSSES, by_entropy, dispersions, fit_gate, mixed, new_gate, star_as_released)
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import Stream

WEIGHTS, POWERS = (0., .1, .3, .5, .7, .9, 1.), (.25, .5, 1., 2., 4.)
Seen = list[tuple[Tensor, Tensor, Tensor]] # of each task: logits weak and strong (n, classes), labels (n,)

def right(
    seen:Seen,
    c:list[Tensor], # (n,) of each task
)->float:
    "Accuracy of mixed probabilities in %, mean over tasks."
    mix = [mixed(w.softmax(1), s.softmax(1), a).argmax(1) == y for (w, s, y), a in zip(seen, c)]
    return 100*float(torch.stack([m.double().mean() for m in mix]).mean())

def fixed(seen:Seen)->list[dict]: # what, number, weight, accuracy
    "Fixed confidences and their controls."
    rows, g = [], torch.Generator().manual_seed(0)
    def add(what, number, c):
        rows.append(dict(what=what, number=number, weight=float(torch.cat(c).mean()), accuracy=right(seen, c)))
    for w in WEIGHTS: add('constant', w, [torch.full((len(y),), w) for _, _, y in seen])
    for name, D in DISPERSIONS.items():
        for a in POWERS:
            c = [D(o.softmax(1))**a for o, _, _ in seen]
            add(name, a, c)
            add(f'{name}, mean', a, [torch.full_like(x, float(torch.cat(c).mean())) for x in c])
            add(f'{name}, shuffled', a, [x[torch.randperm(len(x), generator=g)] for x in c])
    return rows

class Same(nn.Module):
    "One weight for all images: a gate that does not look."
    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(()))
    def forward(self, D:Tensor)->Tensor: return self.b.sigmoid().expand(len(D))

def learned(
    training:Seen,
    seen:Seen,
    seed:int,
)->list[dict]: # what, number, weight, accuracy
    "Networks that have learned on `training`."
    rows = []
    for loss in LOSSES:
        torch.manual_seed(seed)
        for name, G in ((loss, new_gate(8)), (f'{loss}, one weight', Same())):
            fit_gate(G, training, loss, steps=300, lr=.05)
            with torch.no_grad(): c = [G(dispersions(w)) for w, _, _ in seen]
            rows.append(dict(what=name, number=0., weight=float(torch.cat(c).mean()), accuracy=right(seen, c)))
            if loss != 'star': continue
            logits = [(mixed(w, s, a).argmax(1) == y).double().mean() for (w, s, y), a in zip(seen, c)]
            rows.append(dict(rows[-1], what=f'{name}, logits', accuracy=100*float(torch.stack(logits).mean())))
            if name != 'star': continue
            code = [(star_as_released(w, s, G).argmax(1) == y).double().mean() for w, s, y in seen]
            hits = 100*float(torch.stack(code).detach().mean())
            rows.append(dict(rows[-1], what='star, as released', weight=float('nan'), accuracy=hits))    # not that of G
    return rows

def by_confidence(
    seen:Seen,
    n:int=8, # groups
)->list[dict]: # what, number (mean confidence), weight (share), accuracy
    "Accuracy of both models for images of rising confidence (by entropy), in `n` groups of one size."
    c = torch.cat([by_entropy(w.softmax(1)) for w, _, _ in seen])
    order, rows = c.argsort().chunk(n), []
    for k, name in enumerate(('CLIP by confidence', 'routers by confidence')):
        hit = torch.cat([s[k].argmax(1) == s[2] for s in seen]).double()
        for i in order:
            rows.append(dict(what=name, number=float(c[i].mean()), weight=1/n, accuracy=100*float(hit[i].mean())))
    return rows

def looked_at(
    model:nn.Module,
    tokenizer:Callable, # texts -> (n, context)
    stream:Stream,
    s:int|None, # see `views`
)->Seen:
    "Logits of all tasks but that whose routers are used for others."
    found = views(model, tokenizer, stream, s)
    return [(v.logits(-1).detach(), v.logits(v.s).detach(), y) for v, y in found if s is None or v.task != s]

def measure_confidence(
    runs:str|Path, # a folder of runs of the miniature
    file:str|Path, # CSV, written after every run; what it has is not measured again
)->pd.DataFrame: # seed, routers, images, what, number, weight, accuracy
    "All of it, on training and on test images."
    rows = pd.read_csv(file) if Path(file).is_file() else pd.DataFrame(columns=['seed'])
    for directory in sorted(p.parent for p in Path(runs).glob('*/adapters.safetensors')):
        known = known_in(directory)
        seed, T = known.config['seed'], len(known.names)
        if seed in set(rows.seed): continue
        stream, (model, tokenizer, _) = mini(**accepted(mini, known.config['stream_made'])), opened(known)
        for routers, s in dict(last=T - 1, first=0, own=None).items():
            training, test = (looked_at(model, tokenizer, x, s) for x in (held_out(stream), stream))
            for images, seen in dict(training=training, test=test).items():
                new = [*fixed(seen), *learned(training, seen, seed), *by_confidence(seen)]
                new = pd.DataFrame(new).assign(seed=seed, routers=routers, images=images)
                rows = pd.concat([r for r in (rows, new) if len(r)], ignore_index=True)
        with replacing(file) as part: rows.round(4).to_csv(part, index=False)
    return rows


if __name__ == '__main__':
    torch.set_num_threads(1)
    print(measure_confidence(*sys.argv[1:3]).tail())
