import pytest, torch
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.experts import read
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.moe import MoE, mixture
from moe_merge_nb.rewrites.bank import *


def test_columns_that_share_an_expert_and_a_column_that_is_closed():
    from dataclasses import replace
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(3, 3)).eval()
    moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    x, seen = torch.randn(64, 4, 8), []
    mixture(moe, x, 0, seen.append)
    shares = torch.tensor([[1., 0, 0], [1, 0, 0], [0, 0, 0]])
    other = layer(replace(bank(moe), column_to_expert=shares, always_on=torch.tensor([0, 0, .5])))
    y = mixture(other, x, 0, seen.append)
    assert (seen[0].gates[:, 2] > 0).any() and not seen[1].gates[:, 2].any()
    torch.testing.assert_close(y, moe.experts[0](x) + .5 * moe.experts[2](x))
    with pytest.raises(ValueError, match='learns no further tasks'): other.add_task()


def test_out_and_back_changes_nothing():
    from dataclasses import replace
    torch.manual_seed(0)
    small = AdaptedCLIP(load_clip(pretrained='random')[0], n_experts=6, rank=4, shared_init=True).eval()
    for _ in range(2): small.add_task()
    for p in small.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    u, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 90, (4, 20))
    again = with_banks(small, banks(with_banks(small, banks(small))))
    for task in (0, 1):
        torch.testing.assert_close(again.encode_image(u, task), small.encode_image(u, task))
        torch.testing.assert_close(again.encode_text(tokens, task), small.encode_text(tokens, task))
    compressed = with_banks(small, [replace(b, stored=3) for b in banks(small)])
    assert n_expert_parameters(banks(compressed)) == 3 * len(small.moes)
    assert again.clip is small.clip and type(small.moes[0]) is MoE
    for name, t in read(small.moes[0].base).items(): assert torch.equal(read(again.moes[0].base)[name], t)


def test_a_bank_that_does_not_fit_together_is_refused():
    from dataclasses import replace
    small = AdaptedCLIP(load_clip(pretrained='random')[0], n_experts=3, rank=2)
    with pytest.raises(ValueError, match='no task'): banks(small)
    small.add_task()
    one, *others = banks(small)
    wrong = [
        (dict(states=one.states[:2]), '2 experts'),
        (dict(column_to_expert=torch.eye(3)[:2]), 'router columns'),
        (dict(column_to_expert=torch.zeros(3, 3)), 'closed'),
    ]
    for change, says in wrong:
        with pytest.raises(ValueError, match=says): replace(one, **change)
    with pytest.raises(ValueError, match='one per block'): with_banks(small, [one])
    with pytest.raises(ValueError, match='no further tasks'): with_banks(small, [one, *others]).add_task()


def test_closed_routers_stay_closed_and_keep_one_expert():
    net = AdaptedCLIP(load_clip(pretrained='random')[0], n_experts=4, rank=2)
    for _ in range(2): net.add_task()
    for m in net.moes: m.routers[0].closed[:2] = True
    again = with_banks(net, banks(net))
    for m, n in zip(net.moes, again.moes):
        assert all(torch.equal(a.closed, b.closed) for a, b in zip(m.routers, n.routers))
    left = 'task 0 has no column left to select in image block 0'
    with pytest.raises(ValueError, match=left): close(banks(net)[0], [2, 3])
    assert close(banks(net)[0], [0, 1, 3]).column_to_expert.sum() == 1


def test_dropping_an_expert_that_nobody_selects_changes_nothing():
    from moe_merge_nb.layer.moe import MoE, mixture
    torch.manual_seed(0)
    moe = MoE('image', 0, 8, Experts(5, 3)).eval(); moe.add_task()
    for p in moe.parameters(): torch.nn.init.normal_(p)
    moe.routers[0].gate.data[:, 3] = -10                                        # of inputs that are positive
    u = torch.rand(40, 4, 8)
    torch.testing.assert_close(mixture(layer(close(bank(moe), [3])), u, 0), mixture(moe, u, 0))
    assert (mixture(layer(close(bank(moe), [0])), u, 0) - mixture(moe, u, 0)).abs().max() > .01


def test_binding_identical_experts_changes_nothing():
    torch.manual_seed(0)
    small = AdaptedCLIP(load_clip(pretrained='random')[0], n_experts=4, rank=4).eval(); small.add_task()
    for p in small.moes.parameters(): torch.nn.init.normal_(p, std=.3)
    for moe in small.moes: moe.experts[3] = moe.experts[1]
    u = torch.randn(4, 3, 32, 32)
    new = with_banks(small, [bind(b, [[0], [1, 3], [2]], b.states[:3]) for b in banks(small)])
    torch.testing.assert_close(new.encode_image(u, 0), small.encode_image(u, 0))
    assert len(new.moes[0].experts) == 3 and new.moes[0].routers[0].gate.shape[1] == 4
