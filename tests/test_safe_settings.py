from dataclasses import dataclass
import pytest
from moe_merge_nb.safe.settings import *
@dataclass(frozen=True)
class Sample:
    rate:float=setting(.5, number('a number from 0 to below 1', lambda x: 0 <= x < 1))
    size:int=setting(1, whole(1))
    mode:str=setting('a', one_of(('a', 'b')))
    fast:bool=setting(False, flag)
    rest:int|None=setting(None, whole(0))
    free:object=None
    def __post_init__(self): check_fields(self, 'sample')


def test_impossible_fields_are_refused_by_name_value_and_remedy():
    nan, inf = float('nan'), float('inf')
    odd = dict(rate=[nan, inf, -inf, 1, -.1, True, '0', None, [.1], 10**400], size=[0, 1., nan, True, None, '1'],
               mode=['c', None, [], 1], fast=[0, 1, None, 'yes'], rest=[-1, .5, False])
    for name, values in odd.items():
        for value in values:
            with pytest.raises(ValueError, match=f'^sample.{name} is .*: choose ') as e: Sample(**{name: value})
            assert repr(value) in str(e.value)


def test_possible_fields_pass_and_those_without_a_rule_are_not_looked_at():
    assert Sample(rate=0, size=2**70, mode='b', fast=True, rest=0, free='any').rate == 0
    assert Sample(rest=None).rest is None


def test_a_field_without_a_default_has_to_be_given():
    @dataclass
    class Must:
        n:int=setting(rule=whole(2))
        def __post_init__(self): check_fields(self, 'must')
    with pytest.raises(TypeError): Must()
    with pytest.raises(ValueError, match='must.n is 1'): Must(1)
    assert Must(2).n == 2
