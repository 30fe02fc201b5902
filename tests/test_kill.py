"""A run that is killed at any moment and started again ends with the same bytes. `tools/kill_test.py 100` does it a
hundred times; 12_reliability shows where it hit."""
import csv
from pathlib import Path

TOOL = Path(__file__).parent.parent/'tools'

def test_killed_at_six_moments_each_run_ends_as_if_undisturbed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(TOOL)
    from kill_test import main
    out = tmp_path/'kills.csv'
    code, rows = main(6, 1, str(out)), list(csv.DictReader(open(out)))
    said = capsys.readouterr().out
    assert code == 0 and len(rows) >= 6, said
    assert all(r['equal'] == 'True' for r in rows), said
    assert {'training', 'saving', 'evaluation'} <= {r['phase'] for r in rows}
