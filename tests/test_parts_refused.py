"""Parts of one's own that do not do what their kind must: refused before any training, by the name of the option."""
import importlib
import os
import py_compile
import sys
import pytest
import torch
from torch import nn
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.tried import try_out
from moe_merge_nb.learn.checks import check
from moe_merge_nb.merge.rule import Merge, check_rule
from moe_merge_nb.safe.doors import resolve, source_digest
from moe_merge_nb.streams.tasks import toy_stream


class NoState:
    def fit(self, features, labels=None, texts=None): pass
    def select(self, features, task=None): return torch.zeros(len(features), dtype=torch.long)

class OneArgument(NoState):
    def fit(self, features): pass

class Floats(NoState):
    def select(self, features, task=None): return torch.rand(len(features))
    def state(self): return {}
    def restore(self, state): pass

class NeedsMore(Floats):
    def __init__(self, temperature): pass

def a_function(features): return features

@pytest.mark.parametrize('part', [NoState, OneArgument, NeedsMore, a_function])
def test_a_selector_without_its_methods(part):
    with pytest.raises(ValueError, match=r'selectors: .*failed with .*fit\(features, labels, texts\).*restore'):
        check(method('moe', selectors=('oracle', part)), toy_stream(2))

def test_a_selector_that_gives_no_whole_numbers():
    with pytest.raises(ValueError, match=r'selects torch.float32 \(64,\) .*must be \(64,\)'):
        check(method('moe', selectors=(Floats,)), toy_stream(2))

@pytest.mark.parametrize('strategy', [lambda view, t: view, lambda view: view.softmax(1), lambda view: view.features])
def test_a_strategy_that_gives_no_scores(strategy):
    with pytest.raises(ValueError, match=r'predict=.*view.logits\(s\)'):
        check(method('moe', predict=strategy), toy_stream(2))

def never(x, route, experts): return experts[0](x)
def one_token(x, route, experts): return route(x[:, 0])[:, :1, None] * x

class NotAModule:
    def __init__(self, width, rank): pass
    def __call__(self, x): return 0 * x

class NoSuper(nn.Module):
    def __init__(self, width): self.down = nn.Linear(width, width)

@pytest.mark.parametrize('kinds, says', [
    (dict(mix=never), 'experts.mix=.*never routes: route.x. takes .batch, tokens, width'),
    (dict(mix=one_token), 'experts.mix=.*takes .batch, tokens, width.*not .2, 8.'),
    (dict(expert=NotAModule), 'experts.expert=.*makes a NotAModule: it must be a torch.nn.Module'),
    (dict(expert=NoSuper), 'experts.expert=.*failed with AttributeError'),
])
def test_parts_of_a_layer(kinds, says):
    with pytest.raises(ValueError, match=says): try_out(Experts(n_experts=6, rank=4, **kinds))

def test_the_hint_to_base_is_given_where_base_is_the_reason():
    def two(states, counts): return states[0]
    with pytest.raises(ValueError) as e: check_rule(Merge(combine=two), Experts(rank=2))
    assert 'base is None' not in str(e.value)
    with pytest.raises(ValueError, match='base is None'):
        check_rule(Merge(combine=lambda states, counts, base: {n: base[n] for n in base}), Experts(rank=2))

def test_a_file_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path/'broken_part.py').write_text('def f(:')
    (tmp_path/'lacking_part.py').write_text('import torchh\ndef f(view): pass\n')
    (tmp_path/'whole_part.py').write_text('def f(view): pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    reasons = {'broken_part.f': 'failed with SyntaxError', 'lacking_part.f': "No module named 'torchh'"}
    for name, says in reasons.items():
        with pytest.raises(ValueError, match=f'predict is .{name}., and importing it failed') as e:
            resolve(name, {'routed': print}, 'predict')
        assert says in str(e.value)
    assert 'whole_part' not in sys.modules
    with pytest.raises(ValueError, match='that is a file; say whole_part.NAME'): resolve('whole_part', {}, 'predict')
    with pytest.raises(ValueError, match="did you mean 'gaussian'"): resolve('gausian', {'gaussian': print}, 'selector')

@pytest.fixture
def stale(tmp_path, monkeypatch):
    "Writes a module that says 5.0 where its compiled copy says 1.0: the same size, the same second."
    def write(name):
        path = tmp_path/f'{name}.py'
        path.write_text('K = 1.0\ndef f(): return K\n')
        monkeypatch.syspath_prepend(tmp_path)
        py_compile.compile(str(path))
        at = path.stat()
        path.write_text('K = 5.0\ndef f(): return K\n')
        os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))
    return write

def test_what_python_has_compiled_of_an_older_file_is_not_run(stale):
    stale('compiled_part')
    assert resolve('compiled_part.f', {}, 'merge.combine')() == 5.

def test_an_old_compiled_copy_that_was_imported_is_named(stale):
    stale('imported_part')
    f = importlib.import_module('imported_part').f                                  # as a user's program does
    assert f() == 1.
    with pytest.raises(ValueError, match='was compiled from another imported_part.py'): source_digest(f)

def expert_choice(logits): return torch.zeros_like(logits).scatter(0, logits.argmax(0, keepdim=True), 1.)
def in_company(x, route, experts): return experts[0](x) + route(x).sum(1)[:, None, None] + x.mean(0)

class Normalised(nn.Module):
    "A router that compares the sequences of a batch with each other."
    def __init__(self, width, n_experts):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(width, n_experts))
    def forward(self, x0, noisy=False): return (x0 - x0.mean(0)) @ self.gate

@pytest.mark.parametrize('kinds', [dict(gate=expert_choice), dict(mix=in_company), dict(router=Normalised)])
def test_a_part_whose_answer_depends_on_the_company(kinds):
    [kind] = kinds
    with pytest.raises(ValueError, match=f'experts.{kind}=.*differently for a sequence when others share its batch'):
        try_out(Experts(n_experts=6, rank=4, **kinds))

class Loud(nn.Linear):
    "An expert that speaks before it has learned anything."
    def __init__(self, width): super().__init__(width, width)

def test_an_expert_that_speaks_before_training_is_warned_of():
    with pytest.warns(UserWarning, match='experts.expert=.*does not answer 0 before training'):
        try_out(Experts(n_experts=6, rank=4, expert=Loud))
