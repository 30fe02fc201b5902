"""How hypothesis looks for counterexamples.

CI draws the same cases every time; `pytest --hypothesis-profile=hunt tests/test_fuzz.py` draws new ones,
fifty times as many."""
import os
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
ALWAYS = dict(deadline=None, database=None, suppress_health_check=SLOW)
settings.register_profile('ci', max_examples=30, derandomize=True, **ALWAYS)
settings.register_profile('hunt', max_examples=2000, **ALWAYS)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))
