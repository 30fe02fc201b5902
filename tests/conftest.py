"""How hypothesis looks for counterexamples. CI draws the same cases every time; `pytest --hypothesis-profile=hunt tests/test_fuzz.py` draws new ones, fifty times as many."""
import os
from hypothesis import HealthCheck, settings

_slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile('ci', max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=_slow)
settings.register_profile('hunt', max_examples=2000, deadline=None, database=None, suppress_health_check=_slow)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'ci'))
