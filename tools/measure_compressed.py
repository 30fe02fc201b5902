"""What compressed experts recover of the experts that do not run, on MTIL-mini; a row of CSV per model, a few seconds
each; seeds that are there are kept.

    python tools/measure_compressed.py OUT.csv SEED...
"""
import argparse
import copy
import csv
from pathlib import Path
import torch
from torch import Tensor, nn
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.layer.mix import mix_loop, route_once
from moe_merge_nb.layer.moe import Route
from moe_merge_nb.layer.router import top_k_gates
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.learn.learner import Callback
from moe_merge_nb.learn.loss import class_logits
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.streams.mini import mini
from moe_merge_nb.streams.tasks import Task, stack
from moe_merge_nb.variants.compressed import VectorsOnly, main_gates, mix_main_and_aux

HEAD = ['seed', 'what', 'accuracy', 'loss', 'largest_gate']
TASK, TEMPERATURE = 'EuroSAT', 10

def flat_top_k(logits: Tensor) -> Tensor:
    "The four best of them with gates that are nearly equal."
    return top_k_gates(logits / TEMPERATURE, 4)

def main_only(x: Tensor, route: Route, experts: nn.ModuleList) -> Tensor:
    "The main experts without any vectors."
    return mix_loop(x, main_gates(route(x)), experts)

def own_vectors(x: Tensor, route: Route, experts: nn.ModuleList) -> Tensor:
    "The main experts, each by its own vectors, whoever the others are."
    a, y = main_gates(route(x)), torch.zeros_like(x)
    for e, expert in enumerate(experts):
        mine = a[:, e].nonzero().flatten()
        if len(mine): y = y.index_add(0, mine, a[mine, e, None, None] * expert(x[mine], expert.into, expert.inner))
    return y

MIXES = {'full': route_once, 'main': main_only, 'compressed': mix_main_and_aux, 'own vectors': own_vectors}

@torch.no_grad()
def measured(model: AdaptedCLIP, tokenizer: object, task: Task) -> tuple[float, float, float]:
    "Accuracy and cross-entropy of the test images, and the mean largest gate."
    x, labels = stack(task.test)
    seen, words = [], class_embeddings(model, tokenizer, task, 0)
    z = model.encode_image(x, 0, lambda r: seen.append(r.gates.amax(1).mean()))
    logits = class_logits(z, words, model.logit_scale)
    right = 100 * (logits.argmax(1) == labels).double().mean()
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=.2)
    return round(right.item(), 2), round(loss.item(), 4), round(torch.stack(seen).mean().item(), 3)

def mixed(model: AdaptedCLIP, what: str) -> AdaptedCLIP:
    "A copy that combines its experts in this way."
    model = copy.deepcopy(model)
    for moe in model.moes: moe.mix = MIXES[what]
    return model

def rows_of(seed: int) -> list[list]:
    "All experts of a bank are trained; then vectors and routers, for each way to combine them."
    task = next(t for t in mini(seed, n_test=1000) if t.name == TASK)
    clip, tokenizer = load_clip()
    torch.manual_seed(seed)
    bank = AdaptedCLIP(clip, n_experts=8, rank=4, top_k=4, expert='compressed', gate=flat_top_k).eval()
    bank.add_task()
    first, then = Train(iterations=80, batch=32, lr=1e-2), Train(iterations=40, batch=32, lr=1e-2)
    train_task(bank, task, 0, tokenizer, settings=first, seed=seed)
    rows = [[seed, f'{what}, as it is', *measured(mixed(bank, what), tokenizer, task)] for what in ('full', 'main')]
    for what in MIXES:
        model = mixed(bank, what)
        train_task(model, task, 0, tokenizer, settings=then, callbacks=[VectorsOnly()], seed=seed + 1)
        rows.append([seed, what, *measured(model, tokenizer, task)])
    return rows

def main():
    "Append what is missing."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('out', type=Path)
    p.add_argument('seeds', type=int, nargs='+')
    args = p.parse_args()
    torch.set_num_threads(1)
    there = list(csv.reader(args.out.open())) if args.out.exists() else []
    with args.out.open('a', newline='') as f:
        if not there: csv.writer(f, lineterminator='\n').writerow(HEAD)
        for seed in args.seeds:
            if str(seed) in {r[0] for r in there}: continue
            csv.writer(f, lineterminator='\n').writerows(rows_of(seed))
            f.flush()

if __name__ == '__main__': main()
