"""`nbdev_test`, with what every page imports imported once: each page is run by a forked process of its own, so what it
leaves in memory is gone before the next. Arguments are those of `nbdev_test`."""
import gc
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
import seaborn  # noqa: F401
from nbdev import test
from moe_merge_nb.run import command, report  # noqa: F401

test_nb = test.test_nb


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
    gc.freeze()                                                             # nobody looks through it for garbage again
    test.test_nb = apart
    test.nbdev_test()
