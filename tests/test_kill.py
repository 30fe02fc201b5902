"""A run that is killed at any moment and started again ends with the same bytes. `tools/kill_test.py 100` does it a
hundred times; 12_reliability shows where it hit."""
import csv
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parent.parent/'tools'/'kill_test.py'

def test_killed_at_six_moments_each_run_ends_as_if_undisturbed(tmp_path):
    out, env = tmp_path/'kills.csv', {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(TOOL), '6', '--seed', '1', '--out', str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    rows = list(csv.DictReader(open(out)))
    assert done.returncode == 0 and len(rows) >= 6, done.stdout + done.stderr
    assert all(r['equal'] == 'True' for r in rows), done.stdout + done.stderr
    assert {'training', 'saving', 'evaluation'} <= {r['phase'] for r in rows}
