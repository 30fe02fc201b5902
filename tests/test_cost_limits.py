from moe_merge_nb.cost.blocks import row
from moe_merge_nb.cost.limits import *


def test_ratios_are_those_of_medians_and_know_their_limits():
    def seconds(side, values): return row('X', 'training iteration', 10, side=side, values=values)
    def table(): return ratios(rows, 'X').set_index('ratio')
    rows = [seconds('plain', [3., 4., 30.]), seconds('ours', [2., 2., 2.5]), seconds('bare', [1., 2., 2.])]
    rows += [row('X', 'difference', 10, side='gradients', values=[2e-4])]
    rows += [row('Y', 'training iteration', 10, side='plain', values=[9.])]
    assert table().value.to_dict() == {'plain/ours, 10': 2., 'ours/bare, 10': 1., 'gradients': 2e-4}
    assert table().holds.to_dict() == {'plain/ours, 10': True, 'ours/bare, 10': True, 'gradients': False}
    assert table().loc['plain/ours, 10', ['low', 'high']].tolist() == [1.5, 12.]
    rows[1]['values'] = [3., 3., 3.]
    assert not table().holds['plain/ours, 10'] and not table().holds['ours/bare, 10']
