"Store the runs of `make measure` with the package: the measurements that README and figure notebooks show."
from moe_merge_nb.measured import store

if __name__ == '__main__':
    for name, runs in {'mini': ['runs/study', 'runs/baselines'], 'demo': ['runs/demo']}.items(): print(*store(runs, name), sep='\n')
