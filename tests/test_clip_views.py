import torch
from moe_merge_nb.clip.pictures import make_pictures
from moe_merge_nb.clip.views import Views, augment, backgrounds


def test_views_are_images_and_depend_on_the_generator_alone():
    pictures = make_pictures(n_drawn=4)
    pool, chosen = backgrounds(pictures, 30), torch.arange(24)
    kinds = torch.tensor([1]*10 + [2]*14)
    def views(seed, s):
        g = torch.Generator().manual_seed(seed)
        return augment(pictures.draw(chosen, g), kinds, pool=pool, s=s, generator=g)
    a, b, c = views(0, .8), views(0, .8), views(1, .8)
    assert a.shape == (24, 3, 32, 32) and 0 <= a.min() and a.max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c)
