import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.run.header import *
from moe_merge_nb.streams.tasks import toy_stream


def test_an_entry_that_is_strange_missing_or_of_another_kind_is_named():
    good = dict(name='a', classes=['b'], templates=None)
    check_entries(good, 'task')
    check_entries(dict(name='a'), 'task', ['classes', 'templates'])
    for bad, says in (
        ([], "task is '.*', no dictionary"),
        ({**good, 'hook': 'os.system'}, "unknown use: 'hook'"),
        (dict(name='a'), 'task.classes is missing: list or NoneType is wanted'),
        ({**good, 'name': 3}, 'task.name is 3: str is wanted'),
    ):
        with pytest.raises(ValueError, match=says): check_entries(bad, 'task')
