"""Pretrain a second pico on photographs, with class names as captions (nbs/2_clip/13_photographs).

    python tools/pretrain_photo.py FOLDER OUT.safetensors [--steps-factor 1.0] [--seed 0] [--resume]

FOLDER holds FOLDER/SOURCE/CLASS/*.jpg; folders of the same name are one class. About 40 minutes on one core for 80,000
images at factor 1 (0.24 s for each of 8,400 steps on images, 0.15 s for each of 450 on words, 0.7 s for each of 340 on
both, a minute to read the images), about 1.5 GB of memory.
The state is kept every 250 steps beside OUT; after a kill, the same command with --resume goes on there and ends with
the same weights. OUT.json says what the weights were made of.

    moe-merge model.pretrained=OUT.safetensors ...  # model=pico is the default
"""
import argparse
import hashlib
import json
import resource
import sys
import time
from pathlib import Path
import torch
from moe_merge_nb.clip.backbone import write_weights
from moe_merge_nb.clip.photographs import Photographs, PhotoViews, photographs, spelling
from moe_merge_nb.clip.pretrain import History, pretrain
from moe_merge_nb.safe.content import content
from moe_merge_nb.safe.files import write_json

STEPS = (8400, 450, 340)  # of the three stages

def scaled(factor: float) -> tuple[int, int, int]:
    "Steps of the three stages; ValueError for a factor that leaves none."
    if not 0 < factor <= 100: raise ValueError(f'--steps-factor is {factor}: choose a number from 0.001 to 100')
    return tuple(max(2, round(n*factor)) for n in STEPS)

def made_of(
    pictures: Photographs,
    steps: tuple[int, int, int],
    seed: int,
) -> dict:
    "All that decides the weights."
    images = content(pictures.images, pictures.rows, pictures.names).hex()
    return dict(images_sha256=images, steps=list(steps), seed=seed)

def state_of(
    out: Path,
    made: dict,  # of `made_of`
    resume: bool,
) -> Path:
    "The file with the state of exactly this pretraining; ValueError if there is one and nobody said --resume."
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:12]
    state = out.with_name(f'{out.stem}-{digest}.pt')
    if state.exists() and not resume:
        raise ValueError(f'{state} is of a run that did not end: --resume goes on with it; delete it to start anew')
    if resume: print(f'going on with {state}' if state.exists() else 'nothing to resume: starting anew', flush=True)
    return state

def check_out(out: Path):
    "ValueError for a place that weights cannot go to."
    if out.suffix != '.safetensors': raise ValueError(f'OUT is {out}: give a name that ends with .safetensors')
    if out.exists(): raise ValueError(f'{out} is there already: give another name, or delete it')

def told(pictures: Photographs):
    "What is going to be learned."
    names = [n for n, in pictures.names]
    pieces, cut = spelling(names)
    print(f'{len(pictures.images):,} images of {len(names)} classes', flush=True)
    if pieces: print('rare words:', ', '.join(f"{w} ({' '.join(p)})" for w, p in pieces.items()))
    if cut: print(f"cut at 20 tokens: {', '.join(cut)}")

def card(
    made: dict,
    pictures: Photographs,
    history: dict[str, History],
    seconds: dict[str, float],
) -> dict:
    "What the weights were made of, and how well they learned it."
    ends = {stage: dict(zip(('step', 'loss', 'accuracy'), h[-1])) for stage, h in history.items() if h}
    classes = [n for n, in pictures.names]
    return dict(
        name='pico_photo',
        **made,
        images=len(pictures.images),
        classes=classes,
        training=ends,
        seconds={k: round(v, 1) for k, v in seconds.items()})

def main(argv: list[str] | None = None) -> int:
    "Photographs in, weights out."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('out', type=Path)
    p.add_argument('--steps-factor', type=float, default=1.)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--resume', action='store_true')
    args = p.parse_args(argv)
    try:
        check_out(args.out)
        steps, start = scaled(args.steps_factor), time.time()
        pictures = photographs(args.folder)
        told(pictures)
        made = made_of(pictures, steps, args.seed)
        state = state_of(args.out, made, args.resume)
        state.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e: sys.exit(f'pretrain_photo: {e}')
    model, history, seconds = pretrain(pictures, steps, args.seed, checkpoint=state, look=PhotoViews)
    write_json(args.out.with_suffix('.json'), card(made, pictures, history, seconds))
    write_weights(model, args.out)
    state.unlink(missing_ok=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
    print(f'{args.out}: written after {time.time() - start:.0f} s; {memory:.1f} GB of memory at most')
    return 0

if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.exit(main())
