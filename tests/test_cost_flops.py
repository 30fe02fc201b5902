import inspect
import open_clip, pytest, torch
import pandas as pd
from torch import nn
from moe_merge_nb.clip.backbone import *
from moe_merge_nb.cost.flops import *
from moe_merge_nb.layer.kinds import *
from moe_merge_nb.layer.adapt import *
from moe_merge_nb.layer.mix import *
from moe_merge_nb.learn.settings import *
from moe_merge_nb.learn.train import *
from moe_merge_nb.streams.datasets import *
from moe_merge_nb.streams.tasks import *


def test_the_published_parameter_count():
    n = n_adapter_parameters(VIT_B_16, Experts(n_experts=22, rank=64), n_tasks=11)
    assert n == dict(experts=43_625_472, routers=7_434_240)
    clip, _ = load_clip('pico', 'random')
    model = AdaptedCLIP(clip, n_experts=3, rank=4)
    for _ in range(2): model.add_task()
    count = n_adapter_parameters(widths(model.clip), model.settings, n_tasks=2)
    assert sum(count.values()) == sum(p.numel() for p in model.moes.parameters())


def test_a_frozen_block_needs_no_weight_gradients():
    clip, _ = load_clip('pico', 'random')
    for tower, N in dict(image=17, text=9).items():
        b, d = towers(clip)[tower][0], 128
        assert block_flops(b, N) == (24*N*d*d + 4*N*N*d, 24*N*d*d + 8*N*N*d)
        for R in (1, 2):
            linear = 4*N*d*d + 20*R*d*d
            assert block_flops(b, N, R) == (linear + 4*R*N*d, linear + 8*R*N*d)


def test_formulas_agree_with_the_counter():
    clip, tokenizer = load_clip('pico', 'random')
    texts, images = tokenizer(['a red disc', 'a small green disc']), torch.randn(3, 3, 32, 32)
    tokens = dict(image=image_tokens(clip), text=int(texts.argmax(1).max()) + 1)

    def same(model, tower, encode, inputs):
        n = len(inputs)
        for training in (False, True):
            model.train(training)
            def once(): return encode(inputs, 0).sum().backward() if training else encode(inputs, 0)
            assert counted(once) == n * sequence_flops(clip, tower, tokens[tower], Sizes(4, 8), training=training)
        assert counted(lambda: encode(inputs, None)) == n * sequence_flops(clip, tower, tokens[tower])

    for way in (mix_gathered, mix_segments):
        model = AdaptedCLIP(clip, n_experts=4, rank=8, mix=lambda x, route, experts: way(x, route(x), experts))
        model.add_task()
        trainable(model)
        same(model, 'image', model.encode_image, images)
        same(model, 'text', model.encode_text, texts)


def test_a_real_iteration_costs_what_the_table_says():
    clip, tokenizer = load_clip('pico', 'random')
    stream = toy_stream(n_tasks=1, n_classes=3)
    task, model = stream[0], AdaptedCLIP(clip, n_experts=4, rank=8)
    length = int(tokenizer(prompts(task)).argmax(1).max()) + 1
    toy, short = Demand('toy', 3, 48, 24, lengths=(length,)), Train(iterations=2, batch=8, warmup=1)
    row = run_flops(clip, [toy], Sizes(4, 8), iterations=2, batch=8).iloc[0]
    model.add_task()
    real = counted(lambda: train_task(model, task, 0, tokenizer, settings=short))
    wanted = row['training, images'] + row['training, prompts']
    assert real == pytest.approx(wanted, rel=.001) # the logits themselves are not in the table


def test_processes_share_images_but_not_prompts():
    two = pd.DataFrame({'training, images': [3.6e15], 'training, prompts': [3.6e15]})
    assert hours(two, 1).tolist() == pytest.approx([1, 1])
    assert hours(two, 2, devices=4).tolist() == pytest.approx([1/8, 1/2])


def test_memory_kept_is_predicted_for_other_sizes():
    clip, tokenizer = load_clip('pico', 'random')
    model = AdaptedCLIP(clip, n_experts=4, rank=8)
    model.add_task()
    slopes = kept_bytes(model, lengths=(5, 10))
    images, texts = torch.randn(5, 3, 32, 32), torch.ones(7, 13, dtype=torch.long)
    texts[:, -1] = clip.vocab_size - 1
    model.train()
    by_images = saved_bytes(model, lambda: model.encode_image(images, 0))
    by_texts = saved_bytes(model, lambda: model.encode_text(texts, 0))
    assert by_images == pytest.approx(5*slopes.image, rel=.01)
    assert by_texts == pytest.approx(7*(slopes.prompt + 13*slopes.token), rel=.01)


def test_prompts_are_measured_where_they_run_by_segments():
    K, RANK, WIDTH, BYTES = 2, 64, 512, 4
    def copied(n): return n * K * 2*RANK*WIDTH * BYTES # of weights that gathering would copy for n prompts
    assert copied(30) <= GATHER < copied(31)
    assert inspect.signature(kept_bytes).parameters['prompts'].default >= 31


def test_a_storage_is_counted_once_and_parameters_never():
    x, layer = torch.ones(1000, requires_grad=True), nn.Linear(10, 10)
    assert saved_bytes(layer, lambda: (x * 2).exp().sin()) == 4000
    assert saved_bytes(layer, lambda: layer(torch.ones(3, 10))) == 4*30
    assert saved_bytes(nn.Identity(), lambda: layer(torch.ones(3, 10, requires_grad=True))) == 4*(30 + 100)


def test_memory_by_hand():
    toy, kept = Demand('t', 3, 9, 9, lengths=(5, 7)), Kept(100., 10., 1.)
    m = memory(10, dict(experts=6, routers=4), 2, kept, demand=toy, batch=2)
    assert m == {'CLIP, twice': 80, 'adapters': 40, 'gradients': 32, 'AdamW': 64, 'images': 200, 'prompts': 45}
