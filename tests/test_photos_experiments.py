"""The experiments on photographs: what is varied, what is not, and that the folder has to be named."""
import pytest
from moe_merge_nb.run.config import EXPERIMENTS, PHOTOS
from moe_merge_nb.run.job import UsageError, job
from moe_merge_nb.run.options import composed

OF_PHOTOS = [e for e in EXPERIMENTS if e.startswith('photos')]

def tasks(order): return order.strip('[]').split(',')


def test_six_pairs_are_three_seeds_in_two_orders_of_the_same_tasks():
    grid = EXPERIMENTS['photos']
    assert grid['seed'] == [100, 101, 102] and grid['order'] == PHOTOS and len(grid['order'])*len(grid['seed']) == 6
    assert grid['method'] == ['moe', 'moe_merge', 'moe_copy'] and grid['selectors'] == ['[oracle,gaussian]']
    assert sorted(tasks(PHOTOS[0])) == sorted(tasks(PHOTOS[1])) and tasks(PHOTOS[0])[0] != tasks(PHOTOS[1])[0]
    same = {k: v for k, v in EXPERIMENTS['photos_bounds'].items() if k in ('order', 'seed', 'classes', 'stream')}
    assert same == {k: grid[k] for k in same} and len(same) == 4


def test_rates_are_chosen_with_seeds_that_report_nothing():
    for name in ('photos_rates', 'photos_rates_full'):
        grid = EXPERIMENTS[name]
        assert len(grid['train.lr']) == 5 and not set(grid['seed']) & set(EXPERIMENTS['photos']['seed'])
    assert EXPERIMENTS['photos_rates_full']['method'] == ['finetune']


@pytest.mark.parametrize('name', OF_PHOTOS)
def test_a_job_of_each_is_a_run_on_the_folder_that_was_named(name):
    first = [f'{k}={v[0]}' for k, v in EXPERIMENTS[name].items()]
    config = composed(f'experiment={name}', 'root=/photos', 'model.pretrained=w.safetensors', *first)
    assert config.stream.root == '/photos' and list(config.stream.order) == tasks(PHOTOS[0])
    assert config.protocol == 'mini' and config.train.iterations == 150 and list(config.classes) == ['task', 'all']
    assert config.model.name == 'pico' and config.model.pretrained == 'w.safetensors' and config.stream.size == 32
    nowhere = composed(f'experiment={name}', *first)
    with pytest.raises(UsageError, match='root is missing: say root=FOLDER'): job(nowhere)
