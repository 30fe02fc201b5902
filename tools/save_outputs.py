"""Run notebooks and store their outputs.

    python tools/save_outputs.py [--slow] NOTEBOOK ...

The cells that `nbdev_test` leaves out keep the outputs they had, but for those of the flags that are given."""
import sys
from collections.abc import Iterable
from pathlib import Path
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

def is_left_out(
    cell,
    skip: set[str],  # flags of cells that are not run
) -> bool:
    "Does the cell keep the outputs it had?"
    d = cell.directives_
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
    return bool(skip & d.keys()) or d.get('eval:', [''])[0].lower() == 'false'

def save_outputs(
    path: Path,
    flags: Iterable[str] = (),  # cells with these flags are run too
):
    "Run one notebook where it lies, and store what it shows."
    cfg = get_config()
    skip = set(cfg.tst_flags.split()) - set(flags)
    left_out = lambda cell: is_left_out(cell, skip)
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    for cell in nb.cells:
        if not left_out(cell): cell.outputs = []
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=left_out)
    for cell in nb.cells:  # warnings and progress bars are not what a reader should see
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    clean_nb(nb, clean_ids=cfg.clean_ids)
    write_nb(nb, path)

if __name__ == '__main__':
    sys.path.insert(0, str(get_config().config_path))
    flags = [a[2:] for a in sys.argv[1:] if a.startswith('--')]
    for p in sys.argv[1:]:
        if not p.startswith('--'): save_outputs(Path(p).absolute(), flags)
