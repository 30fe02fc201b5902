import pandas as pd
import pytest
import torch
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.learn.views import averaged, routed, row_name
from moe_merge_nb.select.select import Latest, Oracle, dataset_features, make_selector
from moe_merge_nb.streams.tasks import stack, toy_stream
from toys import toy_model


def fitted(net, stream, names=('oracle', 'none', 'gaussian')):
    "Selectors that have learned the first two tasks"
    picks = {name: make_selector(name) for name in names}
    for task in stream.tasks[:2]:
        f = dataset_features(net.clip, task.train)
        for s in picks.values(): s.fit(*f)
    return picks


def test_evaluation_does_not_depend_on_the_batch_size():
    (net, tok), toys = toy_model(), toy_stream(3)
    picks = fitted(net, toys, ('oracle', 'none', 'gaussian', 'autoencoder'))
    one, some, every = (evaluate(net, tok, toys, picks, after='circles', batch=b) for b in (1, 7, 100))
    for a in (one, some):
        pd.testing.assert_frame_equal(a.matrix, every.matrix)
        pd.testing.assert_frame_equal(a.selection, every.selection)
    assert every.matrix.accuracy.nunique() > 2


def test_several_selectors_at_once_are_the_same_as_one_by_one():
    (net, tok), toys = toy_model(name='toy'), toy_stream(3)
    picks = fitted(net, toys)
    together = evaluate(net, tok, toys, picks, after='circles')
    for name, s in picks.items():
        single = evaluate(net, tok, toys, {name: s}, after='circles')
        for a, b in zip(single[:2], together[:2]):
            pd.testing.assert_frame_equal(a, b[b.selector == name].reset_index(drop=True))
    assert (together.selection.groupby(['selector', 'task'])['count'].sum() == 24).all()


def test_accuracy_is_that_of_the_model_called_by_hand():
    net, tok = toy_model()
    toys, oracle = toy_stream(2), Oracle().fit(None)
    row = evaluate(net, tok, toys, {'oracle': oracle}, after='squares').matrix.accuracy
    for i, (task, s) in enumerate(zip(toys, (0, None))): # task 1 is not learned: plain CLIP
        images, labels = stack(task.test)
        z, w = net.encode_image(images, s), class_embeddings(net, tok, task, -1 if s is None else s)
        assert row[i] == pytest.approx(100*((z @ w.T).argmax(1) == labels).double().mean().item())


def test_the_cache_changes_nothing_and_spares_passes():
    (net, tok), toys, cache = toy_model(name='toy'), toy_stream(3), Cache()
    picks = fitted(net, toys)
    first, second, without = (evaluate(net, tok, toys, picks, after='circles', cache=c) for c in (cache, cache, None))
    for row in (second, without):
        assert row.matrix.equals(first.matrix) and row.selection.equals(first.selection)
    assert second.passes['images'] == second.passes['prompts'] == 0
    assert 0 < without.passes['images'] == first.passes['images'] < first.passes['images_naive']


def test_strategies_reach_the_prediction():
    net, tok = toy_model()
    toys, oracle, asked = toy_stream(2), {'oracle': Oracle().fit(None)}, []
    def first_class(view):
        asked.append((view.task, view.s))
        return torch.nn.functional.one_hot(torch.zeros(len(view.features), dtype=torch.long), 3)
    m = evaluate(net, tok, toys, oracle, after='squares', predict=first_class).matrix
    firsts = [100*(stack(t.test)[1] == 0).double().mean().item() for t in toys]
    assert m.accuracy.tolist() == pytest.approx(firsts) and asked == [(0, 0), (1, -1)]
    assert evaluate(net, tok, toys, oracle, after='squares', predict=averaged).matrix.shape == m.shape


def test_all_classes_are_those_of_a_loop_over_images():
    (net, tok), toys = toy_model(name='toy'), toy_stream(3)
    picks = fitted(net, toys, ('oracle', 'gaussian'))
    row = evaluate(net, tok, toys, picks, after='circles', classes=('all',)).matrix
    assert row.selector.unique().tolist() == ['oracle all', 'gaussian all']
    for name, s in picks.items():
        for i, task in enumerate(toys):
            features, right = dataset_features(net.clip, task.test)[0], 0
            for (image, label), r in zip(task.test, s.select(features, task=i).tolist()):
                z = net.encode_image(image[None], r if r >= 0 else None)
                w = torch.cat([class_embeddings(net, tok, t, r) for t in toys])
                right += int((z @ w.T).argmax() == 3*i + label)
            found = row[(row.selector == f'{name} all') & (row.task == task.name)].accuracy.item()
            assert found == pytest.approx(100*right/24), (name, i)


def test_more_classes_never_help_the_same_routers():
    (net, tok), toys, lower = toy_model(name='toy'), toy_stream(3), 0
    picks = fitted(net, toys)
    both = evaluate(net, tok, toys, picks, after='circles', classes=('task', 'all')).matrix
    for name in picks:
        own, wide = (both[both.selector == row_name(name, c)].accuracy.to_numpy() for c in ('task', 'all'))
        assert (wide <= own).all()
        lower += (wide < own).sum()
    assert lower > 0
    one = toy_stream(1)
    alike = evaluate(net, tok, one, {'oracle': Oracle().fit(None)}, after='squares', classes=('task', 'all')).matrix
    assert alike.accuracy[0] == alike.accuracy[1] and alike.selector.tolist() == ['oracle', 'oracle all']


def test_both_label_spaces_encode_an_image_once_and_leave_the_other_rows_alone():
    (net, tok), toys = toy_model(name='toy'), toy_stream(3)
    picks = fitted(net, toys)
    for predict in (routed, averaged):
        how = dict(after='circles', predict=predict)
        spaces = ('task',), ('all',), ('task', 'all')
        own, wide, both = (evaluate(net, tok, toys, picks, classes=c, **how) for c in spaces)
        for key in ('images', 'images_naive'): assert own.passes[key] == wide.passes[key] == both.passes[key]
        more = both.passes['prompts'] - own.passes['prompts']
        # by -1, 0, 1: once each, not once per task
        assert 0 < more <= 3*sum(len(t.classes)*len(t.templates) for t in toys)
        named = both.matrix.selector.str.endswith(' all')
        assert both.matrix[~named].to_csv(index=False) == own.matrix.to_csv(index=False)
        assert both.matrix[named].to_csv(index=False) == wide.matrix.to_csv(index=False)
        assert own.selection.to_csv() == wide.selection.to_csv() == both.selection.to_csv()


def test_several_processes_return_the_tables_of_one():
    import tempfile
    from dataclasses import replace
    from accelerate import Accelerator
    from moe_merge_nb.safe.devices import in_processes
    from torch.utils.data import Subset
    from moe_merge_nb.streams.tasks import Stream
    def setting():
        "A model, a stream whose third task has one test image, fitted selectors"
        (net, tok), toys = toy_model(name='toy'), toy_stream(3)
        a, b, c = toys
        return net, tok, Stream('toy', (a, b, replace(c, test=Subset(c.test, [5])))), fitted(net, toys)
    def work(path):
        accelerator, cache = Accelerator(cpu=True), Cache()
        row = evaluate(*setting(), after='circles', cache=cache, accelerator=accelerator)
        seen = [len(r.index) for (tower, _, s, _), r in cache.rows.items() if tower == 'image' and s < 0]
        kept = row.matrix.to_csv(), row.selection.to_csv(), seen, row.passes['images_naive']
        torch.save(kept, f'{path}/{accelerator.process_index}.pt')
    one = evaluate(*setting(), after='circles')
    with tempfile.TemporaryDirectory() as d:
        in_processes(work, d)
        first, second = (torch.load(f'{d}/{r}.pt') for r in range(2))
    assert first[:2] == second[:2] == (one.matrix.to_csv(), one.selection.to_csv())
    assert first[2] == [12, 12, 1] and second[2] == [12, 12] # each saw its share
    assert first[3] == second[3] == one.passes['images_naive']


def test_training_mode_is_left_as_it_was():
    net, tok = toy_model()
    toys = toy_stream(2)
    latest = {'none': Latest().fit(None)}
    a = evaluate(net.train(), tok, toys, latest, after='squares')
    assert net.training
    assert a.matrix.equals(evaluate(net.eval(), tok, toys, latest, after='squares').matrix)
    with pytest.raises(ValueError, match='selectors is empty'): evaluate(net, tok, toys, {}, after='squares')
