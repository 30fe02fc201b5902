"""The measurement of a GPU, as far as a processor can tell."""
import torch
from moe_merge_nb.clip.backbone import load_clip
from moe_merge_nb.cost.compare import make_case
from moe_merge_nb.cost.gpu import beside_bare, measure_job, moved, precise

CPU = torch.device('cpu')

def test_what_was_set_is_set_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with precise(CPU, 'tf32'): assert torch.get_float32_matmul_precision() == 'high'
    with precise(CPU, 'bf16'): assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

def test_all_sides_of_a_job_are_measured_as_often_as_asked():
    case = moved(make_case(load_clip('pico', 'random'), 3, 2, n_experts=3), CPU)
    rows = measure_job(case, 'image features', CPU, precision='fp32', rounds=2)
    assert [r['side'] for r in rows] == ['plain', 'ours', 'bare', 'open_clip']
    assert all(len(r['seconds']) == 2 and min(r['seconds']) > 0 for r in rows)
    assert all(r['MB'] is None and r['waits'] is None for r in rows)                    # a processor has neither

def test_the_table_divides_medians():
    row = dict(what='a job', precision='fp32', classes=10, experts=22, MB=1., waits=3)
    times = dict(ours=[2., 2., 9.], plain=[6.]*3, bare=[1., 1., 4.])
    rows = [row | dict(side=s, seconds=t) for s, t in times.items()]
    found = beside_bare(rows).iloc[0]
    assert (found['ms'], found['ours/bare'], found['plain/ours'], found['waits']) == (2000., 2., 3., 3)
