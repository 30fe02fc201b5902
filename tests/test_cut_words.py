"""What the model does not read to its end is said once, before anything is trained."""
import warnings
import pytest
import torch
from moe_merge_nb.clip.backbone import cut_off, load_clip, pico_tokenizer
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.checks import check_words
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.streams.mini import DOMAINS
from moe_merge_nb.streams.tasks import Stream, Task, toy_stream

LONG = 'red square with a name of so many words that no model of this size would ever read all of them'

@pytest.fixture(scope='module')
def tokenizer(): return pico_tokenizer()

def test_texts_are_cut_exactly_where_the_tokenizer_cuts_them(tokenizer):
    texts = [' '.join(['fox']*n) + end for n in range(1, 30) for end in ('', '.', ' . ')]
    longer = [i for i, t in enumerate(texts) if len(tokenizer.encode(t)) + 2 > 20]
    assert cut_off(texts, tokenizer) == longer and 0 < len(longer) < len(texts)

def test_a_tokenizer_of_ones_own_is_asked_in_the_same_way():
    def letters(texts, context=6):
        rows = torch.zeros(len(texts), context, dtype=torch.long)
        for row, t in zip(rows, texts):
            ids = [1, *map(ord, t)][:context - 1] + [999]
            row[:len(ids)] = torch.tensor(ids)
        return rows
    assert cut_off(['abc', 'abcd', 'abcde', ''], letters) == [2]

def named(name):
    t = toy_stream(1)[0]
    return Stream('toy', [Task(t.name, (name, *t.classes[1:]), t.templates, train=t.train, test=t.test)])

def test_a_run_warns_once_and_names_a_class(tmp_path):
    method = Method('m', train=Train(iterations=1, batch=4, warmup=0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        run(named(LONG), method, backbone=load_clip(), progress=False)
    texts = [str(w.message) for w in said if 'does not read the prompts' in str(w.message)]
    assert len(texts) == 1 and f'the prompts of 1 of 3 classes, such as {LONG!r} to their end' in texts[0]

def test_a_longer_template_than_the_first_counts_too(tokenizer):
    t = toy_stream(1)[0]
    long = Task(t.name, t.classes, ('a {}.', f'a {LONG} {{}}.'), train=t.train, test=t.test)
    with pytest.warns(UserWarning, match='the prompts of 3 of 3 classes'): check_words(Stream('s', [long]), tokenizer)

def test_nothing_of_the_miniature_benchmark_is_cut(tokenizer):
    for d in DOMAINS.values():
        assert cut_off([t.replace('{}', c) for t in d.templates for c in d.split()], tokenizer) == []
