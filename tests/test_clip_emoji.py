import numpy as np, pytest
from moe_merge_nb.clip.emoji import *


def test_an_outlined_copy_has_few_colours_and_dark_lines():
    from PIL import Image, ImageDraw
    shaded = np.zeros((96, 96, 4), 'uint8')
    shaded[16:80, 16:80] = 255
    shaded[16:80, 16:80, 0] = np.arange(64)*3
    copy = np.asarray(outlined(Image.fromarray(shaded), 3))
    colours = np.unique(copy[copy[..., 3] > 0][:, :3], axis=0)
    assert len(colours) <= 5 and (colours == 20).all(1).any() # at most 4 flat ones and the line
    assert (copy[14:16, 40] == [20, 20, 20, 255]).all(1).any() # a line around the silhouette
