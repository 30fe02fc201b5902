import pytest, torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.select.select import *
from moe_merge_nb.streams.tasks import stack, toy_stream


def test_features_begin_with_the_plain_embedding_and_leave_no_hook():
    clip, _ = load_clip('toy', 'random')
    images, labels = stack(toy_stream(1).tasks[0].test)
    f = frozen_features(clip, images)
    torch.testing.assert_close(f[:, :clip.visual.output_dim], clip.encode_image(images), rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in clip.modules())
    g, again = dataset_features(clip, toy_stream(1).tasks[0].test, batch=5)
    torch.testing.assert_close(g, f, rtol=1e-4, atol=1e-5)
    assert (again == labels).all()


def test_two_processes_gather_all_features_in_order():
    import tempfile
    from accelerate import Accelerator
    from moe_merge_nb.safe.devices import in_processes
    from torch.utils.data import Subset
    def setting(n): return load_clip('toy', 'random')[0], Subset(toy_stream(1)[0].test, range(n))
    def work(path):
        accelerator = Accelerator(cpu=True)
        found = [dataset_features(*setting(n), accelerator=accelerator) for n in (8, 5, 1)]
        torch.save(found, f'{path}/{accelerator.process_index}.pt')
    with tempfile.TemporaryDirectory() as d:
        in_processes(work, d)
        both = [torch.load(f'{d}/{r}.pt') for r in range(2)]
    for n, first, second in zip((8, 5, 1), *both): # 4 + 4, 3 + 2, 1 + 0 images
        f, y = dataset_features(*setting(n))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], y) and torch.equal(second[1], y)
        torch.testing.assert_close(first[0], f, rtol=1e-4, atol=1e-5)


def test_oracle_and_latest():
    for cls, after_two in ((Oracle, [0, 1, -1]), (Latest, [1, 1, 1])):
        s = cls()
        before = [s.select(torch.zeros(2, 3), task=i).tolist() for i in range(2)]
        assert before == [[-1, -1]]*2 # nothing learned: plain CLIP
        s.fit(torch.zeros(4, 3)).fit(torch.zeros(4, 3))
        assert [s.select(torch.zeros(1, 3), task=i).item() for i in range(3)] == after_two
    with pytest.raises(ValueError, match='told the true task'): Oracle().select(torch.zeros(1, 3))


def test_the_decision_for_an_image_ignores_the_other_images():
    (clip, tok), stream = load_clip('toy', 'random'), toy_stream(3)
    x = torch.cat([dataset_features(clip, t.test)[0] for t in stream])
    for name in SELECTORS:
        s = make_selector(name, **(dict(steps=20) if name == 'autoencoder' else {}))
        for t in stream: s.fit(*dataset_features(clip, t.train), class_embeddings(clip, tok, t))
        single = torch.cat([s.select(x[i:i + 1], task=1) for i in range(len(x))])
        assert (single == s.select(x, task=1)).all()
        assert single.dtype == torch.int64 and -1 <= single.min() <= single.max() < 3


def test_a_restored_selector_selects_and_learns_as_the_first_would_have():
    def kinds(x):
        "The types in a state"
        parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
        return {type(x)}.union(*map(kinds, parts))
    (clip, tok), stream = load_clip('toy', 'random'), toy_stream(3)
    learned = [(*dataset_features(clip, t.train), class_embeddings(clip, tok, t)) for t in stream]
    x = torch.cat([dataset_features(clip, t.test)[0] for t in stream])
    for name in SELECTORS:
        s, r = (make_selector(name, **(dict(steps=20) if name == 'autoencoder' else {})) for _ in range(2))
        s.fit(*learned[0]).fit(*learned[1])
        state = s.state()
        assert kinds(state) <= {dict, list, torch.Tensor, int, float, str}
        assert (r.restore(state).select(x, task=1) == s.select(x, task=1)).all() and r.n_tasks == 2
        assert (r.fit(*learned[2]).select(x, task=2) == s.fit(*learned[2]).select(x, task=2)).all()
        assert make_selector(name).restore(state).n_tasks == 2 # a state does not change when its selector goes on


def test_the_same_seed_gives_the_same_selector():
    clip, _ = load_clip('toy', 'random')
    f, y = dataset_features(clip, toy_stream(1)[0].train)
    for name in ('autoencoder', 'gaussian'):
        a, b, c = (make_selector(name, seed=seed).fit(f, y).scores(f) for seed in (0, 0, 1))
        assert (a == b).all() and not (a == c).all()
        state = torch.get_rng_state()
        make_selector(name).fit(f, y)
        assert (torch.get_rng_state() == state).all() # the caller's random numbers are not touched
