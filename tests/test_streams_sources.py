import pytest
from torchvision import datasets as tv
from moe_merge_nb.streams.sources import MTIL, names_of, spoken, templates_of


def test_the_facts_are_those_of_the_benchmark():
    classes = [100, 101, 100, 47, 10, 102, 101, 10, 37, 196, 397] # sums to 1201, the size of MTIL
    assert ' '.join(MTIL) == 'Aircraft Caltech101 CIFAR100 DTD EuroSAT Flowers Food MNIST OxfordPet StanfordCars SUN397'
    assert [s.n_classes for s in MTIL.values()] == [len(set(names_of(n).values())) for n in MTIL] == classes
    assert sum(classes) == 1201
    assert {n for n, s in MTIL.items() if s.test is None} == {'Caltech101', 'EuroSAT', 'SUN397'}
    for total, name in ((8677, 'Caltech101'), (27000, 'EuroSAT'), (108754, 'SUN397')): # published sizes
        assert (MTIL[name].n_train, MTIL[name].n_test) == (int(.8*total), total - int(.8*total))


def test_names_and_prompts_are_clips():
    assert [len(templates_of(n)) for n in MTIL] == [2, 34, 18, 8, 3, 1, 1, 1, 1, 9, 2]
    assert list(names_of('Flowers')) == tv.Flowers102.classes and list(names_of('MNIST')) == tv.MNIST.classes
    assert names_of('SUN397')['theater/indoor_procenium'] == 'theater indoor procenium'
    assert names_of('Caltech101')['Faces'] != names_of('Caltech101')['Faces_easy']
    assert names_of('EuroSAT')['SeaLake'] == 'lake or sea'
    assert names_of('CIFAR100')['aquarium_fish'] == 'aquarium fish'
    for n in MTIL:
        assert all(t.count('{}') == 1 for t in templates_of(n))
        for c in names_of(n).values(): assert c == ' '.join(c.split()) and not set(c) & set('_{}')


def test_two_sets_of_names():
    flowers = ['pink-yellow dahlia?', 'ball moss']
    assert spoken('MNIST', ['3 - three']) == ('3',) and spoken('MNIST', ['3 - three'], 'mtil') == ('3 - three',)
    assert spoken('Flowers', flowers) == ('pink and yellow dahlia', 'air plant')
    assert spoken('Flowers', flowers, 'mtil') == ('pink-yellow dahlia', 'ball moss')
    assert spoken('SUN397', ['bow_window/indoor'], 'mtil') == ('bow window/indoor',)
    assert spoken('EuroSAT', ['River', 'SeaLake'], 'mtil') == ('river', 'lake or sea')
    assert spoken('Food', ['apple_pie', 'my_own']) == ('apple pie', 'my own') # a class that CLIP has no name for
    with pytest.raises(ValueError, match="names is 'CLIP'"): spoken('Food', [], 'CLIP')
