"""A folder stream whose test images are every fifth training image of another one, so that settings are chosen without
the test images.

    python tools/hold_out.py SRC DST [--every 5]

SRC/TASK/train/CLASS is read as stream=folder reads it; SRC/TASK/test is not. DST/TASK/train gets the other
training images, DST/TASK/test the held out ones, all as copies; classes.txt and templates.txt are copied, too. DST must
not exist; it is written beside its place and renamed when it is complete. The SHA-256 of DST/SHA256SUMS, the list of
all files, is printed.
"""
import argparse
import os
import shutil
import sys
from pathlib import Path
from moe_merge_nb.safe.files import beside
from moe_merge_nb.streams.entries import below, by_name, spelled, visible
from moe_merge_nb.streams.shrink import listed

WORDS = ('classes.txt', 'templates.txt')

def folders(path: Path) -> dict[str, Path]:
    "Sub-folders by name."
    return {n: Path(e.path) for n, e in by_name(e for e in visible(path) if e.is_dir()).items()}

def halves(
    task: Path,
    every: int,
) -> dict[str, list[Path]]: # 'train' and 'test' -> files
    "The training images of a task, divided; ValueError where a class would have none to train on or be tested on."
    if not (task/'train').is_dir(): raise ValueError(f'{task} has no folder train/')
    parts = dict(train=[], test=[])
    for c in folders(task/'train').values():
        files = sorted(map(Path, below(c)), key=lambda f: spelled(str(f)))
        if len(files) < every:
            raise ValueError(f'{c} holds {len(files)} images: of fewer than {every} none is held out; lower --every')
        for i, f in enumerate(files): parts['test' if i % every == every - 1 else 'train'].append(f)
    if not parts['train']: raise ValueError(f'{task}/train has no class folders')
    return parts

def copy_words(
    source: Path,
    to: Path,
):
    "The names and prompts that lie in a folder."
    for name in WORDS:
        if (source/name).is_file(): shutil.copyfile(source/name, to/name)

def hold_out(
    source: Path,
    to: Path,
    every: int = 5,
) -> str: # SHA-256 of the list of all files
    "Write the stream; ValueError before anything is written."
    if every < 2: raise ValueError(f'--every is {every}: choose 2 or more')
    if to.exists(): raise ValueError(f'{to} is there already: give another name, or delete it')
    if not source.is_dir(): raise ValueError(f'{source} is no folder')
    parts = {name: halves(task, every) for name, task in folders(source).items()}
    if not parts: raise ValueError(f'{source} has no sub-folder per task')
    to.parent.mkdir(parents=True, exist_ok=True)
    with beside(to) as room:
        for name, splits in parts.items():
            for split, files in splits.items():
                for f in files: copy_to(f, room/name/split/f.relative_to(source/name/'train'))
            copy_words(source/name, room/name)
        copy_words(source, room)
        digest = listed(room)
        os.sync()
        room.rename(to)
    return digest

def copy_to(
    file: Path,
    to: Path,
):
    "Copy one file; its folders are made."
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('source', type=Path)
    p.add_argument('to', type=Path)
    p.add_argument('--every', type=int, default=5)
    args = p.parse_args()
    try: print(f'{args.to}: SHA-256 of its list {hold_out(args.source, args.to, args.every)}')
    except (ValueError, OSError) as e: sys.exit(f'hold_out: {e}')
