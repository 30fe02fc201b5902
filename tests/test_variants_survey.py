"""The survey's routers compare directions, every part and system has its tags, and `method=cosine` is a method."""
import json
import math
import re
from pathlib import Path
import pytest
import torch
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.kinds import Experts, make_router
from moe_merge_nb.layer.tried import try_out
from moe_merge_nb.layer.router import GATES, top_k_gates
from moe_merge_nb.learn.saved import load_result
from moe_merge_nb.merge.rule import Merge
from moe_merge_nb.rewrites.bank import bank
from moe_merge_nb.run.share import load, save
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.variants import survey
from moe_merge_nb.variants.survey import COMPARED, TAGS, WORDS, Cosine, kinds_of_parts, measure_survey, taxonomy
from toys import SMALL, ends_alike, toy_model, whole_and_killed

ROOT = Path(__file__).parents[1]


@pytest.fixture
def routers():
    "A cosine router and a perturbed one with the same weights; tokens."
    torch.manual_seed(0)
    plain = make_router(Experts(n_experts=6, router='cosine'), 16)
    perturbed = make_router(Experts(n_experts=6, router='perturbed_cosine'), 16)
    perturbed.load_state_dict(plain.state_dict())
    return plain, perturbed, torch.randn(50, 16)

def test_the_score_is_its_formula(routers):
    for router, theta in zip(routers, (0, .1)):
        x, W, E = routers[2], router.W.weight, router.E
        for e in range(6):
            h = x @ W.T
            by_hand = 2 * (h @ E[:, e]) / ((h.norm(dim=1) + theta) * (E[:, e].norm() + theta))      # 1 / tau = 2
            torch.testing.assert_close(router(x)[:, e], by_hand, rtol=1e-4, atol=1e-6)

def test_a_longer_token_scores_the_same_unless_lengths_are_perturbed(routers):
    plain, perturbed, x = routers
    assert (plain(7 * x) - plain(x)).abs().max() < 1e-5
    assert (perturbed(7 * x) - perturbed(x)).abs().max() > 1e-3
    assert plain(torch.zeros(1, 16)).equal(torch.zeros(1, 6)) and not perturbed(torch.zeros(1, 16)).isnan().any()

def test_no_score_is_larger_than_the_temperature_allows(routers):
    for router in routers[:2]:
        for log, limit in ((math.log(2), 2), (50., 100)):
            router.sharpness.data.fill_(log)
            assert router(routers[2]).abs().max() <= limit * (1 + 1e-5)
    assert routers[0](routers[0].W.weight.new_ones(1, 16)).abs().max() > 5                  # the limit was in use

def test_experts_are_told_apart_from_the_beginning_and_a_closed_one_is_never_selected(routers):
    plain, _, x = routers
    assert len(set(plain(x[:1])[0].tolist())) == 6
    first = plain(x).argmax(1).mode().values
    plain.closed[first] = True
    assert (top_k_gates(plain(x))[:, first] == 0).all() and (plain(x)[:, first] == -torch.inf).all()

def test_its_column_decides_for_one_expert_and_all_of_it_is_closed_with_its_task(routers):
    plain, _, x = routers
    before = plain(x)
    [column] = plain.column(2)
    with torch.no_grad(): column.copy_(-column)
    after = plain(x)
    torch.testing.assert_close(after[:, 2], -before[:, 2])
    assert after[:, [0, 1, 3, 4, 5]].equal(before[:, [0, 1, 3, 4, 5]])
    model, _ = toy_model(n_tasks=2, router='cosine')
    for moe in model.moes:
        assert not any(p.requires_grad for p in moe.routers[0].parameters())
        assert sum(p.requires_grad for p in moe.routers[1].parameters()) == 3              # W, E and the temperature

def test_rewrites_refuse_it_by_name():
    model, _ = toy_model(router='cosine')
    with pytest.raises(ValueError, match="router='cosine'"): bank(model.moes[0])

def test_every_part_and_system_has_known_tags():
    parts = kinds_of_parts()
    missing = {kind: [n for n in names if n not in TAGS[kind]] for kind, names in parts.items()}
    assert not any(missing.values()), missing
    assert set(parts) == set(TAGS) and {'expert', 'router', 'gate', 'mix', 'combine'} < set(parts)
    for names in TAGS.values():
        for name, tags in names.items():
            for aspect, tag in tags._asdict().items():
                assert tag in getattr(WORDS, aspect).split(', '), (name, aspect, tag)
    table = taxonomy()
    assert len(table) == sum(map(len, parts.values())) and not (table == '?').any(axis=None)

def test_the_systems_are_the_twenty_two_of_the_list():
    page = json.loads((ROOT/'nbs/8_rewrites/00_systems.ipynb').read_text(encoding='utf-8'))
    text = '\n'.join(''.join(c['source']) for c in page['cells'])
    listed = re.findall(r'^\| \d+ \| (.+?) \|', text, re.M)
    assert len(listed) == 22 and set(listed) == set(TAGS['system'])

def test_a_part_without_tags_is_seen(monkeypatch):
    monkeypatch.setitem(GATES, 'mine', top_k_gates)
    table = taxonomy()
    assert table[(table == '?').any(axis=1)].name.tolist() == ['mine']

def test_the_method_is_the_merging_one_with_other_routers():
    found, usual = method('cosine'), method('moe_merge')
    assert found.experts.router == 'cosine' and found.merge == usual.merge == Merge() and found.freeze == usual.freeze
    for router in ('cosine', 'perturbed_cosine'): try_out(Experts(n_experts=4, rank=2, router=router))

def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path/'rows.csv'
    for name in list(COMPARED)[2:]: monkeypatch.delitem(COMPARED, name)
    monkeypatch.setattr(survey, 'mini', lambda seed: toy_stream(1, seed=seed))
    how = dict(data_seeds=[50], domain=toy_stream(1)[0].name, iterations=2)
    measure_survey(path, **how)
    rows = path.read_text().splitlines()
    path.write_text('\n'.join(rows[:2]) + '\n')
    measure_survey(path, **how)
    assert path.read_text().splitlines() == rows and len(rows) == 3

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_it_is_trained_killed_resumed_merged_and_shared(here):
    how = ['method=cosine']
    whole_and_killed([*SMALL, *how])
    ends_alike()
    assert any(e['kind'] == 'merge' for e in load_result('whole').events)
    model, x = load('whole').model, torch.randn(2, 3, 32, 32)
    assert isinstance(model.moes[0].routers[1], Cosine)
    again = load(save(model, 'shared.safetensors', name='toy', pretrained='random')).model
    assert torch.equal(again.encode_image(x, 1), model.encode_image(x, 1))
