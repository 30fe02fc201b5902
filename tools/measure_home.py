"""What the parts of HoME change on MTIL-mini; a row of CSV per training, a few seconds each; rows that are there are
kept.

    python tools/measure_home.py size|scarce OUT.csv SEED...

The factor was chosen by `moe_merge_nb.variants.home.measure_scale`, on training images.
"""
import argparse
import copy
import csv
from pathlib import Path
import torch
from torch import Tensor, nn
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.layer.experts import Expert, NormExpert
from moe_merge_nb.layer.moe import Routing
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.learn.loss import class_logits
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import Task, stack
from moe_merge_nb.variants.home import open_only

class SwishOnly(Expert):
    "The default expert with Swish."
    def hidden(self, x): return nn.functional.silu(self.down(x))

class NormOnly(NormExpert):
    "The default expert, normalised."
    def hidden(self, x): return self.norm(self.down(x)).relu()

KINDS = { # name -> expert, rank
    'relu': ('relu', 16),
    'relu, rank 20': ('relu', 20), # as many numbers as HoME's
    'swish': (SwishOnly, 16),
    'norm + relu': (NormOnly, 16),
    'norm + swish': ('norm', 16),
    'HoME': ('norm_swish', 16),
}
SCALE, LR = 1.5, 1e-2
HEAD = ['part', 'seed', 'what', 'scale', 'accuracy', 'ratio', 'zeros', 'parameters']

@torch.no_grad()
def accuracy(model: AdaptedCLIP, tokenizer: object, task: Task, index: int) -> float:
    "Per cent of the task's test images that are right by its own routers."
    x, labels = stack(task.test)
    words = class_embeddings(model, tokenizer, task, index)
    logits = class_logits(model.encode_image(x, index), words, model.logit_scale)
    return 100 * (logits.argmax(1) == labels).double().mean().item()

@torch.no_grad()
def sizes(model: AdaptedCLIP, task: Task, counts: dict, index: int = 0) -> tuple[float, float]:
    "Largest by smallest size of used experts' answers, geometric mean over image blocks; share of hidden units at 0."
    seen, ratios, zeros = {}, [], []
    def probe(r: Routing): seen[r.tower, r.block] = r.x
    model.encode_image(stack(task.test)[0][:64], index, probe)
    for moe in model.moes:
        if moe.tower != 'image': continue
        x, c = seen['image', moe.block], counts['image', moe.block]
        used = [moe.experts[e] for e in (c >= .01 * c.sum()).nonzero().flatten().tolist()]
        std = torch.stack([e(x).std() for e in used])
        zeros += [(e.hidden(x) == 0).double().mean().item() for e in used]
        ratios.append((std.max() / std.min()).log())
    return torch.stack(ratios).mean().exp().item(), sum(zeros) / len(zeros)

def new_model(kind: str, scale: float, seed: int, **fields: object) -> tuple[AdaptedCLIP, object]:
    "A model before any task, and its tokenizer."
    clip, tokenizer = load_clip()
    torch.manual_seed(seed)
    expert, rank = KINDS[kind]
    return AdaptedCLIP(clip, n_experts=22, rank=rank, scale=scale, expert=expert, **fields).eval(), tokenizer

def learn(model: AdaptedCLIP, tokenizer: object, task: Task, index: int, seed: int) -> dict[object, Tensor]:
    "Usage while `task` was trained."
    settings = Train(iterations=60, batch=32, lr=LR)
    return train_task(model, task, index, tokenizer, settings=settings, seed=seed).counts()

def one_kind(kind: str, scale: float, seed: int) -> list:
    "EuroSAT, learned as a first task."
    task = next(t for t in mini(seed) if t.name == 'EuroSAT')
    model, tokenizer = new_model(kind, scale, seed)
    model.add_task()
    counts = learn(model, tokenizer, task, 0, seed=seed)
    ratio, zeros = sizes(model, task, counts)
    parameters = sum(p.numel() for p in model.moes[0].experts[0].parameters())
    right = accuracy(model, tokenizer, task, 0)
    return ['size', seed, kind, scale, round(right, 2), round(ratio, 3), round(zeros, 4), parameters]

SEEN = {'shared + own': (range(11), [13]), 'shared only': (range(11), []), 'own only': ([], [13])}

def scarce(kind: str, seed: int) -> list[list]:
    "Two tasks with all images, then one with five a class, which sees shared experts, its own, or both."
    model, tokenizer = new_model(kind, SCALE, seed, router='home', mix='home')
    names, rows = ('EuroSAT', 'MNIST'), []
    for i, name in enumerate(names):
        model.add_task()
        for moe in model.moes: open_only(moe.routers[i], list(range(11)), [11 + i])
        learn(model, tokenizer, next(t for t in mini(seed) if t.name == name), i, seed=seed)
    model.add_task()
    task = next(t for t in mini(seed, shots=5) if t.name == 'Aircraft')
    for what, (shared, own) in SEEN.items():
        m = copy.deepcopy(model)
        for moe in m.moes: open_only(moe.routers[2], list(shared), own)
        learn(m, tokenizer, task, 2, seed=seed)
        rows.append(['scarce', seed, f'{kind}, {what}', SCALE, round(accuracy(m, tokenizer, task, 2), 2), '', '', ''])
    return rows

SIZES = [(kind, SCALE) for kind in KINDS] + [('relu', .1), ('HoME', .1)] # the default factor, too

def jobs(part: str, seed: int) -> dict[tuple, object]:
    "What distinguishes each job's first row, and the function that gives its rows."
    if part == 'size': return {(part, str(seed), *map(str, a)): lambda a=a: [one_kind(*a, seed)] for a in SIZES}
    return {('scarce', str(seed), 'HoME, shared + own', str(SCALE)): lambda: scarce('HoME', seed)}

def main():
    "Append what is missing."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('part', choices=['size', 'scarce'])
    p.add_argument('out', type=Path)
    p.add_argument('seeds', type=int, nargs='+')
    args = p.parse_args()
    torch.set_num_threads(1)
    there = list(csv.reader(args.out.open())) if args.out.exists() else []
    known = {tuple(r[:4]) for r in there}
    with args.out.open('a', newline='') as f:
        if not there: csv.writer(f, lineterminator='\n').writerow(HEAD)
        for seed in args.seeds:
            for key, job in jobs(args.part, seed).items():
                if key in known: continue
                csv.writer(f, lineterminator='\n').writerows(job())
                f.flush()

if __name__ == '__main__': main()
