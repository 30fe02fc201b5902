"""Long and wide: streams of many tasks, tasks of one class, of a thousand, of one image, many experts, long texts,
other scripts. Each works, or is refused before anything is trained."""
import gc
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from moe_merge_nb.baselines.methods import METHODS, method
from moe_merge_nb.clip.backbone import pico_tokenizer
from moe_merge_nb.layer.adapt import AdaptedCLIP
from moe_merge_nb.layer.experts import Expert, many, read
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.layer.mix import mix_gathered, mix_loop, mix_segments
from moe_merge_nb.layer.moe import MoE
from moe_merge_nb.layer.router import top_k_gates
from moe_merge_nb.learn import loop
from moe_merge_nb.learn.cache import Cache
from moe_merge_nb.learn.callbacks import FreezeMostUsed, MergeMostUsed
from moe_merge_nb.learn.loop import run
from moe_merge_nb.learn.checks import check
from moe_merge_nb.learn.method import Method
from moe_merge_nb.learn.metrics import mtil_metrics
from moe_merge_nb.learn.results import accuracy_matrix
from moe_merge_nb.learn.saved import load_result, save_result
from moe_merge_nb.learn.settings import Train
from moe_merge_nb.learn.train import train_task
from moe_merge_nb.merge.rule import Merge, merge_once
from moe_merge_nb.streams.tasks import Images, Stream, Task, prompts
from stacked import mix_stacked


TOKENIZER = pico_tokenizer()
VISION = CLIPVisionCfg(image_size=8, patch_size=4, width=16, layers=1, head_width=8)
TEXT = CLIPTextCfg(context_length=20, vocab_size=4514, width=16, heads=2, layers=1)
SHORT = Train(iterations=2, batch=2, warmup=1)
ALWAYS = Merge(every=1, until=1.)

def tiny():
    "A CLIP of one block a tower for images of 8 x 8 pixels."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIP(16, VISION, TEXT).eval().requires_grad_(False)

def images(n, n_classes, seed=0):
    "Noise."
    pixels = np.random.default_rng(seed).integers(0, 255, (n, 3, 8, 8), dtype='uint8')
    return Images(pixels, np.arange(n) % n_classes)

def task(name='a', classes=('red', 'blue'), n=4, n_test=2):
    "A task of noise: `n` images to train with, `n_test` to evaluate with."
    train, test = images(n, len(classes)), images(n_test, len(classes), 1)
    return Task(name, classes, ('a {} thing.',), train=train, test=test)

def moe_merge(selectors=('oracle',), experts=None, **changes):
    "A few iterations with a merge after each."
    return Method(
        'moe_merge',
        experts={**dict(n_experts=6, rank=2, top_k=2), **(experts or {})},
        train=SHORT,
        merge=ALWAYS,
        freeze=FreezeMostUsed(2),
        selectors=selectors,
        **changes)

def learned(tasks, m, directory=None):
    "What is learned; every accuracy is there and a percentage."
    stream = Stream('wide', tuple(tasks))
    result = run(stream, m, backbone=(tiny(), TOKENIZER), directory=directory, progress=False)
    for s in m.selectors:
        A = accuracy_matrix(result, s)
        assert A.shape == (len(tasks),) * 2
        assert ((A >= 0) & (A <= 100)).all() and np.isfinite(mtil_metrics(A).average)
    return result

def learned_or_refused(tasks, m, says):
    "It is learned, or refused before training with a message that says so."
    try: check(m, Stream('odd', tuple(tasks)))
    except ValueError as e: assert says in str(e)
    else: learned(tasks, m)

def n_prompts(t):
    "How many different prompts the tokenizer sees."
    return len({tuple(row) for row in TOKENIZER(prompts(t)).tolist()})


# ---- long

class Weighed(Images):
    "Images that note the bytes of all tensors, without those of a cache, each time a batch of them is loaded."
    def __init__(self, images):
        super().__init__(images.images, images.labels)
        self.notes = []

    def __getitems__(self, i):
        gc.collect()
        alive = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter, Cache)]
        storages = [o.untyped_storage() for o in alive if not isinstance(o, Cache)]
        taken = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        self.notes.append(taken - sum(o.nbytes for o in alive if isinstance(o, Cache)))
        return super().__getitems__(i)

def weighed(n, at):
    "`n` tasks, of which those `at` are weighed; and what they note in their first iteration."
    tasks = [task(f't{i}') for i in range(n)]
    for i in at: tasks[i] = replace(tasks[i], train=Weighed(tasks[i].train), calibration=None)
    return tasks, lambda: [tasks[i].train.notes[0] for i in at]

ROUTERS = 2 * (2 * 16 * 6 * 4 + 6)  # of a task: blocks; gate and noise, width, experts, bytes; which experts are closed
LEFT = 16  # anything else that a task may leave

@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "40 tasks in one stream, of 2 iterations each: the cost is in the square."
    tasks, notes = weighed(40, (10, 25, 39))
    d = tmp_path_factory.mktemp('long')
    result = learned(tasks, moe_merge())  # saving 80 times is most of what this would cost
    return result, save_result(result, d), notes()

def test_forty_tasks_are_learned_with_a_router_each(long):
    result, d, _ = long
    assert sum(k.startswith('0.routers.') and k.endswith('.gate') for k in result.adapters) == 40
    back = load_result(d, adapters=True)
    assert len(back.matrix) == 40**2 and back.matrix.equals(result.matrix)
    assert back.adapters.keys() == result.adapters.keys()

def test_before_a_task_is_learned_it_is_at_zero_shot_level_however_many_came_before(long):
    A = accuracy_matrix(long[0], 'oracle')
    for i in range(1, 40): assert (A[:i, i] == A[0, i]).all()

def test_when_all_experts_are_frozen_merges_say_why_there_is_none_and_routers_go_on(long):
    result, _, _ = long
    frozen, exhausted = {}, {}
    for e in result.events:
        key = e['tower'], e['block']
        if e['kind'] == 'freeze': frozen.setdefault(key, set()).update(e['experts'])
        if len(frozen.get(key, ())) == 6: exhausted.setdefault(key, []).append(e)
    assert len(exhausted) == 2
    late = [e for events in exhausted.values() for e in events]
    assert all(e['kind'] != 'merge' for e in late)
    assert all('no target among 6 experts (6 frozen' in e['why'] for e in late if e['kind'] == 'no_merge')
    gates = [result.adapters[f'0.routers.{t}.gate'] for t in (20, 39)]
    assert all(g.abs().max() > 0 for g in gates) and result.adapters['0.frozen'].all()

def test_memory_grows_by_routers_and_cache_only(long):
    a, b, c = long[2]
    for growth in ((b - a) / 15, (c - b) / 14):
        assert ROUTERS <= growth <= ROUTERS + LEFT, f'{growth:.0f} bytes a task; routers take {ROUTERS}'

@pytest.mark.parametrize('left', ['learner', 'loss', None])
def test_what_every_task_leaves_behind_is_seen(monkeypatch, left):
    kept, real = [], loop.train_task
    def train(*args, **kw):
        learner = real(*args, **kw)
        if left: kept.append(learner if left == 'learner' else torch.zeros(LEFT))
        return learner
    monkeypatch.setattr(loop, 'train_task', train)
    tasks, notes = weighed(8, (4, 7))
    learned(tasks, moe_merge())
    a, b = notes()
    assert ((b - a) / 3 <= ROUTERS + LEFT) == (left is None), (b - a) / 3

def test_result_rows_are_those_that_are_documented(long):
    r = long[0]
    assert len(r.matrix) == len(r.selection) == 40**2
    assert len(r.usage) == 40 * 2 * 6
    assert len(r.fixed) == 40 * 2 * 2
    assert len(r.timings) == 40


# ---- wide

@pytest.mark.parametrize('k', [1, 2, 256])
def test_a_layer_of_256_experts_is_mixed_alike_by_every_formulation(k):
    torch.manual_seed(k)
    experts = many(lambda: Expert(6, 2), 256).eval()
    for e in experts: torch.nn.init.normal_(e.up.weight)
    x, gates = torch.randn(9, 3, 6), top_k_gates(torch.randn(9, 256), k)
    y = mix_loop(x, gates, experts)
    assert (gates > 0).sum(1).eq(k).all()
    for mix in (mix_stacked, mix_gathered, mix_segments):
        torch.testing.assert_close(mix(x, gates, experts), y, rtol=1e-4, atol=1e-5)

def test_a_stream_is_learned_with_256_experts():
    r = learned([task('a'), task('b')], moe_merge(experts=dict(n_experts=256)))
    usage = r.usage[r.usage.after == 'a'].groupby(['tower', 'block'])['count'].agg(['sum', 'size'])
    assert (usage['size'] == 256).all()
    assert (usage.loc['image', 'sum'] == 2 * 2 * 2).all()  # k x images x iterations

def test_a_task_with_one_class_is_always_right_and_one_more_class_not():
    selectors = 'oracle', 'gaussian', 'text', 'none'
    r = learned([task('one', ('red',)), task('two')], moe_merge(selectors))
    for s in selectors: assert (accuracy_matrix(r, s)[:, 0] == 100).all()

def test_a_task_with_a_thousand_classes_is_learned():
    classes = tuple(f'thing {i}' for i in range(1000))
    many = task('many', classes, n=1000, n_test=1000)
    A = accuracy_matrix(learned([many, task('two')], moe_merge()), 'oracle')
    assert A[0, 0] < 5  # from noise nothing can be learned: one in a thousand is right by chance

@pytest.mark.parametrize('name', sorted(set(METHODS) - {'zscl'}))
def test_a_task_of_one_image_is_learned_or_refused_before_training(name):
    changes = dict(train=SHORT)
    if METHODS[name].experts: changes['experts'] = dict(n_experts=3, rank=2, top_k=1)
    if METHODS[name].merge: changes['merge'] = ALWAYS
    small = [task('one image', n=1, n_test=1), task('two')]
    learned_or_refused(small, method(name, **changes), "'one image' has 1 training images")

def test_one_image_is_learned_by_the_oracle_and_refused_for_selectors_that_hold_images_out():
    small = [task('one image', n=1, n_test=1), task('two')]
    learned(small, moe_merge())
    says = "'one image' has 1 training images: the selectors .'gaussian'. need at least 4"
    with pytest.raises(ValueError, match=says): learned(small, moe_merge(('oracle', 'gaussian')))

@pytest.mark.parametrize('name', ['finetune', 'icarl', 'lwf', 'wise_ft', 'moe_merge', 'rail', 'rail_kernel'])
def test_a_class_without_training_images_is_learned_as_far_as_it_can_be_or_refused(name):
    changes = dict(train=SHORT)
    if name == 'moe_merge': changes |= dict(experts=dict(n_experts=3, rank=2, top_k=1), merge=ALWAYS)
    odd = replace(task('a', ('red', 'blue', 'green'), n=6, n_test=3), train=images(6, 2), calibration=None)
    learned_or_refused([odd, task('b', n=6)], method(name, **changes), "'a'")

def test_a_batch_larger_than_the_task_sees_images_again():
    r = learned([task(n=3)], replace(moe_merge(), train=Train(iterations=2, batch=50, warmup=1)))
    assert (r.usage[r.usage.tower == 'image'].groupby('block')['count'].sum() == 2 * 50 * 2).all()


# ---- words

SCRIPTS = (
    *('猫', '犬', 'قطة', 'सिंह', 'котёнок', 'γάτα', '고양이', '🐈', '🐕'),
    *('é', 'e', 'ß', '1', '٣'),
    *('chat "noir"', "l'oiseau", '<b>', '&amp', '%s', '\\n'),
)
TWINS = [
    ('Cat', 'cat'),
    ('cat', 'cat '),
    ('a  b', 'a b'),
    ('very ' * 30 + 'red', 'very ' * 30 + 'blue'),
]

def test_class_names_of_any_script_are_different_prompts_and_are_learned():
    t = task('scripts', SCRIPTS, n=len(SCRIPTS), n_test=len(SCRIPTS))
    assert n_prompts(t) == len(SCRIPTS)
    learned([t], moe_merge(('oracle', 'text')))

def test_a_text_longer_than_the_context_is_cut_at_the_end_and_still_ends():
    long, short = 'very ' * 200 + 'long', 'short'
    t = task('long', (long, short))
    tokens = TOKENIZER(prompts(t))
    end = tokens.max()
    assert tokens.shape == (2, 20)
    assert (tokens.max(1).values == end).all() and tokens[0, -1] == end
    learned([t], moe_merge(('oracle', 'text')))

@pytest.mark.parametrize('classes', TWINS)
def test_classes_whose_prompts_are_the_same_tokens_are_refused(classes):
    t = task('twins', classes)
    assert n_prompts(t) == 1
    with pytest.raises(ValueError, match='twins'): learned([t], moe_merge())


# ---- frozen

def test_with_all_experts_frozen_training_moves_the_new_router_only():
    model = AdaptedCLIP(tiny(), n_experts=3, rank=2, top_k=2)
    model.add_task()
    for moe in model.moes: moe.freeze([0, 1, 2])
    for moe in model.moes:
        for e in moe.experts: torch.nn.init.normal_(e.up.weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = Train(iterations=3, batch=2, warmup=1, lr=.1)
    callbacks = [MergeMostUsed(ALWAYS), FreezeMostUsed(2)]
    learner = train_task(model, task(), 0, TOKENIZER, settings=settings, callbacks=callbacks)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and all('.routers.0.' in k for k in moved)
    assert {e['kind'] for e in learner.events} == {'no_merge', 'freeze'}

def test_a_layer_without_a_target_is_left_as_it_is():
    moe = MoE('image', 0, 4, Experts(3, rank=2))
    moe.add_task()
    moe.freeze([0, 1, 2])
    before = [read(e) for e in moe.experts]
    event = merge_once(moe, torch.tensor([3, 2, 1]), Merge())
    assert event['kind'] == 'no_merge' and event['target'] is None and json.dumps(event)
    for a, e in zip(before, moe.experts):
        assert all(torch.equal(a[k], t) for k, t in read(e).items())

@pytest.mark.parametrize('n', [6, 99])
def test_freezing_all_experts_after_the_first_task_leaves_the_stream_running(n):
    r = learned([task('a'), task('b'), task('c')], replace(moe_merge(), freeze=FreezeMostUsed(n)))
    assert r.fixed.groupby(['after', 'tower', 'block']).size().max() <= 6
