"""`nbdev_test`, with what every page imports imported once: each page is run by a forked process of its own, so what it
leaves in memory is gone before the next. Nobody looks at what it shows: that is formatted once, and pictures have half
the pixels a side. Arguments are those of `nbdev_test`."""
import gc
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
import seaborn  # noqa: F401
from execnb.shell import CaptureShell
from matplotlib.backends.registry import backend_registry
from matplotlib_inline.backend_inline import set_matplotlib_formats
from nbdev import test
from moe_merge_nb.run import command, report  # noqa: F401

test_nb = test.test_nb


class Silent(CaptureShell.displayhook_class):
    "The shell formats the value of a cell itself, afterwards."
    def compute_format_data(self, result: object) -> tuple[dict, dict]: return {}, {}


class Shell(CaptureShell):
    "What `nbdev_test` runs a page in, but for the size of pictures and how often they are drawn."
    displayhook_class = Silent

    def __init__(self, path: Path):
        super().__init__(path, mpl_format='png')
        set_matplotlib_formats('png', bbox_inches=None)                         # not drawn once more to be cropped


def here(page: Path, **how) -> tuple[bool, float]:  # passed, seconds
    "Run it in this process."
    return test_nb(page, **how)


def apart(page: Path, **how) -> tuple[bool, float]:  # passed, seconds
    "Run it in a process of its own."
    with ProcessPoolExecutor(1, mp_context=get_context('fork')) as one:
        try: return one.submit(here, page, **how).result()
        except BrokenProcessPool: print(f'{page.name}: its process was ended (is the memory full?)', file=sys.stderr)
    return False, 0.


if __name__ == '__main__':
    backend_registry.list_all()                                             # asks all installed packages, once
    gc.freeze()                                                             # nobody looks through it for garbage again
    test.test_nb, test.CaptureShell = apart, Shell
    test.nbdev_test()
