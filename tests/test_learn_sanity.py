import warnings
from types import SimpleNamespace
import pandas as pd
import pytest, torch
from moe_merge_nb.streams.tasks import *
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.learn.sanity import *
def trained():
    "A learner after three iterations."
    clip, tokenizer = load_clip('pico', 'random')
    model = AdaptedCLIP(clip, n_experts=4, rank=2)
    model.add_task()
    return train_task(model, toy_stream()[0], 0, tokenizer, Train(iterations=3, batch=4, warmup=1))


def test_what_is_counted_twice_or_not_at_all_is_found():
    learner = trained()
    check_counts(learner)
    learner.usage.counts['image', 1] += 1
    said = "task 'squares': block 1 of the image tower selected 28 experts in all, not 24"
    with pytest.raises(ValueError, match=said): check_counts(learner)
    learner.usage.counts['image', 1] -= 1
    learner.usage.counts['image', 1][0] -= 6                                        # a quarter of all: it happens
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_counts(learner)
    learner.usage.counts['image', 1][0] -= 5                                        # of twelve second gates one is left
    with pytest.warns(UserWarning, match=said.replace('28', '13')): check_counts(learner)


def test_weights_that_are_no_numbers_are_named():
    learner = trained()
    check_weights(learner.model, 'squares')
    with torch.no_grad(): learner.model.moes[2].experts[1].up.weight[0, 0] = float('inf')
    said = "after task 'squares', 1 tensors of the model hold NaN or infinity: moes.2.experts.1.up.weight"
    with pytest.raises(ValueError, match=said): check_weights(learner.model, 'squares')


def test_accuracies_are_complete_and_percentages():
    rows = pd.DataFrame([('oracle', 'a', t, 50.) for t in 'ab'], columns=['selector', 'after', 'task', 'accuracy'])
    check_matrix(rows, ['a', 'b'], ['oracle'])
    for bad in (float('nan'), -1., 100.5):
        with pytest.raises(ValueError, match=f"selector 'oracle' on task 'b' is {bad}: it must be from 0 to 100"):
            check_matrix(rows.assign(accuracy=[50., bad]), ['a', 'b'], ['oracle'])
    for part in (rows[:1], pd.concat([rows, rows[:1]])):
        with pytest.raises(ValueError, match='there must be one each'):
            check_matrix(part, ['a', 'b'], ['oracle'])
