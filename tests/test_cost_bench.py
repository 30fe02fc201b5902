import json
from moe_merge_nb.cost.bench import *
from moe_merge_nb.cost.blocks import row


def test_rows_survive_a_file():
    import tempfile, pathlib
    rows = [row('pico', 'training iteration', 10, side='ours', values=[.25, .5])]
    rows += [row('pico', 'difference', 10, side='gradients', values=[1e-6])]
    with tempfile.TemporaryDirectory() as d:
        path = pathlib.Path(d)/'bench.json'
        write(rows, path)
        back = json.loads(path.read_text())
    assert back['rows'] == rows and back['provenance']['threads'] >= 1
