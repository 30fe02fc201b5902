import subprocess
import pytest, torch
from moe_merge_nb.safe.provenance import *


def test_a_commit_is_named_and_whether_files_differ_from_it():
    import tempfile
    from pathlib import Path
    from moe_merge_nb.safe.provenance import git
    AUTHOR = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
    with tempfile.TemporaryDirectory() as d:
        here = Path(d)/'package'
        here.mkdir()
        (here/'__init__.py').write_text('')
        assert commit_of(here) == dict(commit=None, dirty=None)             # no repository
        git(Path(d), 'init', '-q')
        assert commit_of(here) == dict(commit=None, dirty=None)             # a repository, but not of these files
        git(Path(d), 'add', '.')
        git(Path(d), *AUTHOR, 'commit', '-q', '-m', 'x')
        clean = commit_of(here)
        assert len(clean['commit']) == 12 and clean['dirty'] is False
        (here/'__init__.py').write_text('changed')
        assert commit_of(here) == dict(clean, dirty=True)
