import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from functools import cache
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.baselines.methods import method
from moe_merge_nb.layer.kinds import Experts
from moe_merge_nb.learn.loop import run
from moe_merge_nb.streams.tasks import toy_stream
from moe_merge_nb.study.watch import *

def tiny():
    "`moe_merge` with few and small experts, trained for a moment."
    m = method('moe_merge', selectors=('oracle',), experts=Experts(n_experts=6, rank=4))
    return replace(m, train=replace(m.train, iterations=12, batch=8, warmup=2))

@cache
def looked():
    "What is seen while it is trained; the model."
    return watched(toy_stream(2), tiny(), 3, load_clip('toy', 'random'))


def test_looking_changes_nothing_and_the_merges_are_the_runs_own():
    small, clip = tiny(), load_clip('toy', 'random')
    log = None
    for m in (small, replace(small, merge=None)):
        seen, model = looked() if m.merge else watched(toy_stream(2), m, 3, clip, rule=small.merge)
        ran = run(toy_stream(2), m, 3, clip, progress=False)
        merges = [e for e in ran.events if e['kind'] == 'merge']
        log = {(e['task'], e['iteration'], e['tower'], e['block']): e['target'] for e in merges} or log
        for name, w in model.moes.state_dict().items():
            torch.testing.assert_close(w, ran.adapters[name], rtol=0, atol=0)
        if m.merge: t = pd.DataFrame(seen)
    targets = t[(t.who == 'target') & (t.measure == 'share after')]
    assert {(r.task, r.iteration, r.tower, r.block): r.expert for r in targets.itertuples()} == log
    assert len(log) == 2 * 4 * 2


def test_measurements_hang_together():
    t = pd.DataFrame(looked()[0])
    at = lambda measure, who: t[(t.measure == measure) & (t.who == who)].reset_index(drop=True)
    put_back = at('this task: loss', 'before').value.round(5)
    assert (at('stand-in loss', 'sources').value.round(5) == put_back).all()
    merged = at('earlier task: loss', 'merged')
    assert len(merged) == 4 and set(merged.task) == {toy_stream(2)[1].name}
    where = ['task', 'iteration', 'tower', 'block']
    share = t[t.measure == 'share before'].pivot_table(index=where, columns='who', values='value')
    assert (share['source 1'] >= share['source 2']).all() and (share['source 2'] >= share.target).all()
    mass = t[t.measure == 'mass at the end'].groupby(['task', 'tower', 'block']).value.sum()
    assert np.allclose(mass, 100) and t[t.measure == 'entropy'].tower.eq('image').all() and t.value.notna().all()
