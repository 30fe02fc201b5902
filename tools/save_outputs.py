"Run notebooks and store their outputs, leaving out the cells `nbdev_test` leaves out (those keep the outputs they had)."
import sys
from pathlib import Path
from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

def save_outputs(path, flags=()):
    cfg = get_config()
    skip = set(cfg.tst_flags.split()) - set(flags)
    nb = NBProcessor(path, rm_directives=False, process=True).nb
    def left_out(cell):
        d = cell.directives_
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        return bool(skip & d.keys()) or d.get('eval:', [''])[0].lower() == 'false'
    shell = CaptureShell(path)
    for cell in nb.cells:
        if cell.cell_type == 'code' and not left_out(cell): cell.outputs = []
    with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=left_out)
    for cell in nb.cells:  # warnings and progress bars are not what a reader should see
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    clean_nb(nb, clean_ids=cfg.clean_ids)
    write_nb(nb, path)

if __name__ == '__main__':
    sys.path.insert(0, str(get_config().config_path))
    flags = [a[2:] for a in sys.argv[1:] if a.startswith('--')]
    for p in sys.argv[1:]:
        if not p.startswith('--'): save_outputs(Path(p).absolute(), flags)
