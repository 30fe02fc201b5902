"Names and prompts of the real benchmark beside those of the package clip-benchmark, where it has them: `pip install --no-deps clip-benchmark`."
import json
from pathlib import Path
import pytest
from moe_merge_nb.streams.datasets import names_of, templates_of

def test_names_and_prompts_agree_with_clip_benchmark():
    found = pytest.importorskip('clip_benchmark.datasets') # a development check: `pip install --no-deps clip-benchmark`
    here = Path(found.__path__[0])
    classes, templates = (json.loads((here/f'en_{f}.json').read_text()) for f in ('classnames', 'zeroshot_classification_templates'))
    plain = lambda names: [' '.join(n.lower().split()) for n in names] # CLIP's tokenizer sees no case and no double spaces
    for ours, theirs in dict(Flowers='flowers', EuroSAT='eurosat', MNIST='mnist', OxfordPet='pets').items(): assert plain(names_of(ours).values()) == plain(classes[theirs])
    assert plain(names_of('Caltech101').values()) == plain(classes['caltech101'][1:]) # theirs begins with 'background'
    own = dict(Aircraft='fgvc_aircraft', Caltech101='caltech101', CIFAR100='cifar100', DTD='dtd', EuroSAT='eurosat', Flowers='flowers', MNIST='mnist', OxfordPet='pets', SUN397='sun397')
    for ours, theirs in own.items(): assert list(templates_of(ours)) == [t.replace('{c}', '{}') for t in templates[theirs]]
    assert list(templates_of('StanfordCars')[1:]) == [t.replace('{c}', '{}') for t in templates['cars']]
    assert templates_of('Food')[0].replace('a photo of a', 'a photo of') == templates['food101'][0].replace('{c}', '{}')
