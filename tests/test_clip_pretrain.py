import pytest, torch
from moe_merge_nb.clip.backbone import pico, pico_tokenizer
from moe_merge_nb.clip.pictures import make_pictures
from moe_merge_nb.clip.pretrain import pretrain, stage_images, zero_shot
from moe_merge_nb.clip.start import initialise
from moe_merge_nb.clip.views import Views


def test_a_run_is_repeatable_and_its_first_stage_may_come_from_a_file():
    import tempfile
    pictures = make_pictures(n_drawn=2)
    views = Views(pictures)
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/c.pt'
        a, history, _ = pretrain(pictures, (3, 2, 2), progress=False)
        model = initialise(pico().train(), torch.cat([views(0, i, 500, .4)[0] for i in range(4)]))
        stage_images(model, views, 3, checkpoint=path, progress=False)
        b, _, _ = pretrain(pictures, (3, 2, 2), checkpoint=path, progress=False) # stage 1 comes from the file
    assert set(history) == {'images', 'words', 'both'} and not a.training
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()): assert torch.equal(p, q), name


def test_zero_shot_accuracy_is_a_percentage_of_right_answers():
    from moe_merge_nb.clip.encode import encode_text
    from moe_merge_nb.streams.tasks import Images, Task, prompts
    dark = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    light = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    data = Images(torch.cat([dark, light]), [0, 0, 1, 1]) # the third label is wrong
    task = Task('brightness', ('dark', 'light'), templates=('a {} photo.',), train=data, test=data)
    model, tokenizer = pico().eval(), pico_tokenizer()
    w = encode_text(model, tokenizer(prompts(task))).detach()
    model.encode_image = lambda x: w[(x[:, 0, 0, 0] > 0).long()] # sees the class in the first pixel
    assert zero_shot(model, tokenizer, task) == 75


def test_the_shipped_weights_are_as_good_as_their_card_says():
    import json
    from moe_merge_nb.clip.backbone import PICO, load_clip
    from moe_merge_nb.streams.mini import mini
    card = json.loads((PICO/'card.json').read_text(encoding='utf-8'))
    model, tokenizer = load_clip()
    task = next(t for t in mini() if t.name == 'Caltech')
    assert zero_shot(model, tokenizer, task) == pytest.approx(card['zero_shot']['Caltech']['train'], abs=1.5)
    assert (PICO/'model.safetensors').stat().st_size <= 8e6
