"""How hypothesis looks for counterexamples.

CI draws the same cases every time; `pytest --hypothesis-profile=hunt tests/test_fuzz.py` draws new ones,
many times as many."""
import ctypes
import ctypes.util
import gc
import os
import signal
from threading import RLock
import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import HealthCheck, settings
from tqdm import tqdm

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
ALWAYS = dict(deadline=None, database=None, suppress_health_check=SLOW)
settings.register_profile('ci', max_examples=12, derandomize=True, **ALWAYS)
settings.register_profile('hunt', max_examples=2000, **ALWAYS)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))

# Hydra copies all that it was told for every composition, which is half of the time that one takes; nothing changes it
ConfigStore.__deepcopy__ = lambda self, memo: self

# by default all forked processes share one lock, which one that is killed with it in its hands would never give back
tqdm.set_lock(RLock())
tqdm.monitor_interval = 0

# a shell that runs this in its background has Ctrl-C ignored, and all that is started here would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = 'sweep own_parts report_safe cli_process readme learn_loop kill fuzz wide'.split()

def pytest_collection_modifyitems(items):
    "What takes longest first, so that no worker is left with it in the end."
    items.sort(key=lambda item: item.path.stem.removeprefix('test_') not in SLOW)

def pytest_collection_finish():
    "What is imported by now stays, so nobody looks through it for garbage again."
    gc.collect()
    gc.freeze()

@pytest.fixture(autouse=True, scope='module')
def memory_is_given_back():
    "What the tests of one file leave in memory is gone before the next."
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(ctypes.util.find_library('c')), 'malloc_trim', None)     # glibc only
    if trim: trim(0)


@pytest.fixture(autouse=True)
def environment_is_as_it_was():
    "What a test sets in os.environ, or the code it calls, is gone before the next: processes would inherit it."
    before = {k: v for k, v in os.environ.items() if k != 'PYTEST_CURRENT_TEST'}
    yield
    for k in set(os.environ) - set(before) - {'PYTEST_CURRENT_TEST'}: del os.environ[k]
    os.environ.update(before)
