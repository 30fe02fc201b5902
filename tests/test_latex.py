"""Tables for a paper: LaTeX with booktabs rules, intervals by Student, names escaped."""
import re
import pytest
from scipy.stats import t as student
from moe_merge_nb.learn.results import example_result, summary
from moe_merge_nb.learn.saved import save_result
from moe_merge_nb.run import figures, report
from moe_merge_nb.study.tables import latex, statistics, with_interval

RUNS = [example_result(m, s) for m in ('moe', 'moe_merge') for s in (0, 1, 2)]

def test_an_interval_is_students():
    last = [summary(r).set_index('selector').Last['oracle'] for r in RUNS[:3]]
    mean = sum(last)/3
    sd = (sum((x - mean)**2 for x in last)/2)**.5
    half = student.ppf(.975, 2)*sd/3**.5
    rows = with_interval(RUNS)
    assert rows.Last['moe', 'oracle'] == f'{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]'
    assert rows.runs.tolist() == [3]*4 and list(rows.columns) == ['Transfer', 'Average', 'Last', 'runs']
    assert '[' not in ''.join(with_interval(RUNS[:1]).Last)                            # one run has none

def test_a_table_has_rules_and_names_are_text():
    text = latex(with_interval(RUNS), r'In \%.', 'tab:x')
    rules = r'\toprule', r'\midrule', r'\bottomrule', r'\begin{tabular}{lllllr}'
    for said in (*rules, r'\caption{In \%.}', r'\label{tab:x}'): assert said in text
    assert r'moe\_merge & oracle & ' in text and len(re.findall(r'\\\\\n', text)) == 5 # a head and four rows
    odd = statistics(RUNS).reset_index(drop=True)['Last'].assign(name=['a_b', '50%', 'x&y', '#1'])
    for name in (r'a\_b', r'50\%', r'x\&y', r'\#1'): assert name in latex(odd)

def test_the_command_writes_them_before_it_draws_anything(tmp_path, monkeypatch, capsys):
    for i, r in enumerate(RUNS): save_result(r, tmp_path/'runs'/str(i))
    monkeypatch.setattr(report, 'begin', lambda stack: [])
    monkeypatch.setattr(figures, 'report', lambda *_, **__: (tmp_path/'report.html', []))
    assert report.main([str(tmp_path/'runs'), '--latex', str(tmp_path/'paper'/'tables'), '--quiet']) == 0
    methods, tasks = ((tmp_path/'paper'/'tables'/f'{n}.tex').read_text(encoding='utf-8') for n in ('methods', 'tasks'))
    assert methods == latex(with_interval(RUNS), r'Means over runs in \%, with 95 \% intervals.', 'tab:methods')
    assert r'\label{tab:tasks}' in tasks and all(t in tasks for t in RUNS[0].config['tasks'])
    assert 'methods.tex' in capsys.readouterr().out

def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, 'begin', lambda stack: [])
    save_result(RUNS[0], tmp_path/'run')
    (tmp_path/'file').write_text('')
    assert report.main([str(tmp_path/'run'), '--latex', str(tmp_path/'file'/'x'), '--quiet']) == 2
    assert capsys.readouterr().err.count('\n') == 1
