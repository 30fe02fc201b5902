"""What comes from runs, files and arguments is shown by terminals and spreadsheets, never obeyed."""
import io
import sys
import pytest
from moe_merge_nb.learn.pack import pack, unpack
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import load_result, save_result
from moe_merge_nb.safe.shown import Shown, cell, shown, uncell, visible

FORMULAS = ['=HYPERLINK("http://x","y")', '+1', '-1', '@SUM(1)', "'=1", "'", '=', "''"]

def named(*tasks):
    "A run whose tasks have these names, saved tables and all."
    r = example_result('=cmd()', n_tasks=len(tasks))
    new = dict(zip(r.config['tasks'], tasks))
    for name in ('matrix', 'selection', 'usage', 'fixed'):
        table = getattr(r, name)
        for c in table.columns.intersection(['after', 'task', 'selected']): table[c] = table[c].replace(new)
    r.events = [{**e, 'task': new[e['task']]} for e in r.events]
    r.config['tasks'] = list(tasks)
    return r

def test_control_characters_are_written_out_in_whatever_a_command_prints(capsys):
    @shown
    def command():
        print('moe\x1b[2J\x07\r', 'b\u202ea', 'ü')
        print('name\x1b]0;title\x07\rover', file=sys.stderr)
        print('\r 50 %\r', end='', file=sys.stderr)
        sys.exit('moe-merge: \x1b[31m bad')
    with pytest.raises(SystemExit) as e: command()
    out, err = capsys.readouterr()
    assert out == 'moe\\x1b[2J\\x07\\r b\\u202ea ü\n'
    assert err == 'name\\x1b]0;title\\x07\\rover\n\r 50 %\r'
    assert e.value.code == 'moe-merge: \\x1b[31m bad'

def test_a_stream_that_knows_ascii_only_gets_what_it_can_show():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, 'ascii', write_through=True)
    print('61.1 ± 0.3, ü', file=Shown(stream))
    assert raw.getvalue() == b'61.1 +- 0.3, \\xfc\n' and visible('ü ± \n\t') == 'ü ± \n\t'

def test_no_name_in_an_exported_table_is_a_formula_and_all_come_back(tmp_path):
    assert [uncell(cell(t)) for t in [*FORMULAS, 3, None]] == [*FORMULAS, 3, None]
    r = named(*FORMULAS[:4])
    r.matrix['selector'] = "'=quoted"
    back = load_result(save_result(r, tmp_path/'run'))
    assert list(back.matrix.task) == list(r.matrix.task) and back.config['method'] == '=cmd()'
    assert set(back.matrix.selector) == {"'=quoted"} and back.selection.equals(r.selection)
    [again] = unpack(pack([r], tmp_path/'runs.csv'))
    assert again.config['method'] == '=cmd()' and again.config['tasks'] == FORMULAS[:4]
    for text in [(tmp_path/'run'/'matrix.csv').read_text(), (tmp_path/'runs.csv').read_text()]:
        cells = [c.strip('"') for line in text.splitlines() for c in line.split(',')]
        assert not [c for c in cells if c.startswith(('=', '+', '@'))]
