import importlib, sys
from functools import partial
import pytest
from moe_merge_nb.safe.doors import *
shouts = {'loud': str.upper, 'root': 'math.sqrt'}


def test_an_unknown_name_is_refused_with_the_known_ones():
    for bad in ('no_such', 'math.no_such', 'math.pi', 3):
        with pytest.raises(ValueError, match='shout is .*choose one of loud, root'): resolve(bad, shouts, 'shout')


def test_an_edited_file_has_another_digest():
    import tempfile
    from pathlib import Path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'my_shouts_of_a_test.py'
        file.write_text('def twice(s): return s + s')
        sys.path.insert(0, folder)
        try:
            before = sources({'shout': ('my_shouts_of_a_test.twice', shouts)})
            file.write_text('def twice(s): return s*2')
            with pytest.raises(ValueError, match='has changed since it was imported here'):
                sources({'shout': ('my_shouts_of_a_test.twice', shouts)})
            importlib.reload(sys.modules['my_shouts_of_a_test'])
            after = sources({'shout': ('my_shouts_of_a_test.twice', shouts)})
        finally: sys.path.remove(folder)
    assert before.keys() == after.keys() == {'my_shouts_of_a_test.twice'} and before != after


def test_methods_of_built_in_classes_have_names_too():
    import torch
    assert called(str.upper) == 'builtins.str.upper' and importable_name(str.upper, 'x') == 'builtins.str.upper'
    assert called([].append) == 'builtins.list.append'
    with pytest.raises(ValueError, match='no other process can import'): importable_name(torch.Tensor.mean, 'x')
