"One label space over all tasks: a name that two tasks have is one class, for every strategy, head and selector"

from dataclasses import replace
import pytest
import torch
from torch.utils.data import Subset
from moe_merge_nb.baselines.rail import Rail
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.learn.evaluate import evaluate
from moe_merge_nb.learn.features import class_embeddings
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.views import STRATEGIES, View, averaged, best_copy, make_strategy, one_per_name
from moe_merge_nb.select.select import Oracle, dataset_features
from moe_merge_nb.streams.tasks import Stream, toy_stream

NAMES = ('red square', 'green square', 'blue square')
TEMPLATES = ('a photo of a {}.',), ('a sketch of a {}.', 'a drawing of a {}.')

def same_names(classes=(NAMES, NAMES), templates=TEMPLATES):
    "Tasks `photo` and `sketch`: squares and circles by the colours of `classes`"
    old = toy_stream(2)
    tasks = [replace(t, name=n, classes=c, templates=e)
             for t, n, c, e in zip(old, ('photo', 'sketch'), classes, templates)]
    return Stream('twice', tasks)

def by_name(matrix, task, selector='oracle all'):
    "Its accuracy"
    return matrix[(matrix.selector == selector) & (matrix.task == task)].accuracy.item()

def logits_by_hand(clip, tokenizer, stream, images):
    "Of plain CLIP: one dictionary per image, name -> the largest of its copies"
    z = torch.nn.functional.normalize(clip.encode_image(images), dim=-1)
    said = [{} for _ in images]
    for task in stream:
        w = class_embeddings(AdaptedCLIP(clip, n_experts=0).eval(), tokenizer, task)
        scores = clip.logit_scale.exp() * z @ w.T
        for row, best in zip(scores.tolist(), said):
            for name, score in zip(task.classes, row): best[name] = max(score, best.get(name, -1e9))
    return said

@pytest.mark.parametrize('templates', [TEMPLATES, (TEMPLATES[0],) * 2])
def test_the_second_task_is_judged_by_the_name(templates):
    clip, tokenizer = load_clip()
    stream, found = same_names(templates=templates), {}
    with torch.no_grad():
        for task in stream:
            images = torch.stack([x for x, _ in task.test])
            said = logits_by_hand(clip, tokenizer, stream, images)
            right = [max(s, key=s.get) == task.classes[y] for s, (_, y) in zip(said, task.test)]
            found[task.name] = 100 * sum(right) / len(right)
    model, how = AdaptedCLIP(clip, n_experts=0).eval(), dict(progress=False, classes=('task', 'all'))
    matrix = evaluate(model, tokenizer, stream, {'oracle': Oracle()}, after='photo', **how).matrix
    for task in stream.names: assert by_name(matrix, task) == pytest.approx(found[task])
    assert found['sketch'] > 50                                                 # it was exactly 0
    if templates[0] == templates[1]: # then both spaces are the same three names
        for task in stream.names: assert by_name(matrix, task) == by_name(matrix, task, 'oracle')

def test_names_are_one_where_the_tokenizer_reads_them_as_one():
    tokenizer = load_clip('toy', 'random')[1]
    stream = same_names((NAMES, ('Green  Square', 'pink square', 'RED square')))
    assert one_per_name(stream, tokenizer).tolist() == [0, 1, 2, 1, 3, 0]
    assert one_per_name(toy_stream(3), tokenizer).tolist() == list(range(9))

def test_the_score_of_a_name_is_the_largest_of_its_copies():
    scores = torch.tensor([[1., 2, 3, 9, 0], [5., 2, 3, 4, 8]])
    assert best_copy(scores, torch.tensor([0, 1, 2, 1, 0])).tolist() == [[1, 9, 3], [8, 4, 3]]
    assert torch.equal(best_copy(scores, torch.arange(5)), scores)

def test_strategies_see_names_and_equal_copies_change_nothing():
    "Probabilities are those among names: a second copy takes no share"
    once, twice = torch.tensor([[3., 1, 0]]), torch.tensor([[3., 1, 0, 3, 1, 0]])
    columns = torch.tensor([0, 1, 2] * 2)
    views = [View(None, 0, torch.zeros(1, 2), lambda s, *over: once), View(
        None, 0, torch.zeros(1, 2), lambda s, *over: best_copy(twice, columns), columns=columns)]
    strategies = [s for s in map(make_strategy, STRATEGIES) if not hasattr(s, 'fit')]
    for strategy in strategies: assert torch.equal(*map(strategy, views))
    assert averaged(views[1]).sum() == pytest.approx(1)

@pytest.mark.parametrize('kind', ['primal', 'kernel'])
def test_rail_knows_a_name_by_any_of_its_copies(kind):
    clip, tokenizer = load_clip()
    stream = same_names()
    model, head = AdaptedCLIP(clip, n_experts=0).eval(), Rail(kind=kind)
    for task in stream:
        f, y = dataset_features(clip, task.train)
        head.fit(f, y, class_embeddings(model, tokenizer, task))
    picks = {'oracle': Oracle().fit(None).fit(None)}
    how = dict(after='sketch', progress=False, predict=head.predict, classes=('task', 'all'))
    matrix = evaluate(model, tokenizer, stream, picks, **how).matrix
    for task in stream.names: assert by_name(matrix, task) > 60
    f, columns = dataset_features(clip, Subset(stream[1].test, range(9)))[0], one_per_name(stream, tokenizer)
    view = View(None, 1, f, lambda s: torch.zeros(9, 3), columns=columns)
    z, scores = head.embedding(f), head.regression.scores
    best = torch.maximum(scores(z, slice(0, 3)), scores(z, slice(3, 6)))
    torch.testing.assert_close(head.predict(view), .05/3 + .95*best)

def test_a_whole_run_with_adapters():
    method = Method('moe', experts=dict(n_experts=4, rank=4), train=Train(iterations=12, batch=12, warmup=1, lr=1e-2),
                    selectors=('oracle', 'text'), classes=('task', 'all'))
    result = run(same_names(), method, progress=False)
    assert by_name(result.matrix[result.matrix.after == 'sketch'], 'sketch') > 40
