"""Names and prompts of the real benchmark beside those of the package clip-benchmark, where it has them.

A development check: `pip install --no-deps clip-benchmark`."""
import json
from pathlib import Path
import pytest
from moe_merge_nb.streams.sources import names_of, templates_of

NAMES = dict(Flowers='flowers', EuroSAT='eurosat', MNIST='mnist', OxfordPet='pets')
PROMPTS = dict(
    Aircraft='fgvc_aircraft',
    Caltech101='caltech101',
    CIFAR100='cifar100',
    DTD='dtd',
    EuroSAT='eurosat',
    Flowers='flowers',
    MNIST='mnist',
    OxfordPet='pets',
    SUN397='sun397',
)

def plain(names):
    "As CLIP's tokenizer sees them: no case and no double spaces."
    return [' '.join(n.lower().split()) for n in names]

def test_names_and_prompts_agree_with_clip_benchmark():
    here = Path(pytest.importorskip('clip_benchmark.datasets').__path__[0])
    classes = json.loads((here/'en_classnames.json').read_text())
    templates = json.loads((here/'en_zeroshot_classification_templates.json').read_text())
    theirs = lambda name: [t.replace('{c}', '{}') for t in templates[name]]
    for ours, name in NAMES.items():
        assert plain(names_of(ours).values()) == plain(classes[name])
    assert plain(names_of('Caltech101').values()) == plain(classes['caltech101'][1:])  # theirs has 'background'
    for ours, name in PROMPTS.items():
        assert list(templates_of(ours)) == theirs(name)
    assert list(templates_of('StanfordCars')[1:]) == theirs('cars')
    assert templates_of('Food')[0].replace('a photo of a', 'a photo of') == theirs('food101')[0]
