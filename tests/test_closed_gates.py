"""Gates that are 0 in single precision are a fact of a report, not a warning of every default run."""
import pandas as pd
from moe_merge_nb.learn.results import Result
from moe_merge_nb.run.page import closed_gates, facts

def counted(*sums, **experts):
    "A run of one task: as many selections in each block of the text tower, by two experts."
    rows = [('a', 'text', block, e, n) for block, total in enumerate(sums) for e, n in enumerate((total - 2, 2))]
    usage = pd.DataFrame(rows, columns=['after', 'tower', 'block', 'expert', 'count'])
    return Result(dict(method='moe', experts=dict(gate='top_k', shared_blocks=0) | experts), usage=usage)

def test_the_block_that_lost_most_is_named_with_its_share():
    said = 'up to 25 % of the selections of a block (task a, text tower, block 1)'
    assert closed_gates([counted(100, 99, 100), counted(200, 150, 180)]) == said
    assert facts([counted(100, 75)])['gates of 0'] == said

def test_nothing_is_said_of_what_is_small_or_cannot_be_known():
    for run in (counted(1000, 991), counted(100, 50, gate='top_p'), counted(100, 50, shared_blocks=1)):
        assert closed_gates([run]) == '' and 'gates of 0' not in facts([run])
    assert closed_gates([Result(dict(method='zero_shot', experts=None))]) == ''
