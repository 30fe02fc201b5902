import nbformat, pytest, re
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pathlib import Path
from tempfile import TemporaryDirectory
from moe_merge_nb.run.report import *
from moe_merge_nb.learn.results import example_result
from moe_merge_nb.learn.saved import save_result


def test_report_of_runs_with_and_without_what_the_figures_need():
    import contextlib, io
    with TemporaryDirectory() as d:
        for m in ('moe', 'moe_merge'): save_result(example_result(m), Path(d)/m)
        plain = example_result('finetune', n_tasks=4)
        plain.events, plain.usage, plain.fixed = [], plain.usage[:0], plain.fixed[:0]
        save_result(plain, Path(d)/'finetune')
        with contextlib.redirect_stdout(io.StringIO()) as printed: assert main([d, '--quiet']) == 0
        text = (Path(d)/'report.html').read_text(encoding='utf-8')
        assert 'moe_merge' in printed.getvalue() and str(Path(d)/'report.html') in printed.getvalue()
    assert len(re.findall('<h2 ', text)) == len(NOTEBOOKS) == len(re.findall('<li><a', text))
    assert text.count('These rows come with the package') == 1
    assert text.count('data:image/png') >= 6 and 'Traceback' not in text and len(text) < 5e6
    assert '<script' not in text and '<link' not in text and 'src="http' not in text
    print(printed.getvalue().split('report:')[0])
