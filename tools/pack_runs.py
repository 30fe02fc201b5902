"Store the runs of `make measure` with the package: the measurements that README, figure notebooks and the comparison of rules show."
from moe_merge_nb.measured import FIELDS, FOLDER, ordered, store
from moe_merge_nb.results import load_results, pack

if __name__ == '__main__':
    for name, runs in {'mini': ['runs/study', 'runs/baselines'], 'demo': ['runs/demo']}.items(): print(*store(runs, name), sep='\n')
    print(pack(ordered(load_results(['runs/shared', 'runs/combine', 'runs/combine_aligned'])), FOLDER/'combine.csv.gz', (*FIELDS, 'experts.shared_init')))
