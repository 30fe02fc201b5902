"The commands as a user types them, in processes of their own."
import json, signal, subprocess, sys, time
from pathlib import Path
import pytest

TINY = ['stream=toy', 'stream.n_tasks=2', 'model=random', 'train.iterations=3', 'train.warmup=1', 'train.batch=8', 'experts.n_experts=4', 'experts.rank=2']

def command(name, *args, cwd):
    return subprocess.run([str(Path(sys.executable).with_name(name)), *args], cwd=cwd, capture_output=True, text=True, timeout=300)

def test_a_sweep_runs_every_combination_side_by_side_and_saves_each(tmp_path):
    done = command('moe-merge', '-m', *TINY, 'method=moe,moe_merge', 'hydra/launcher=joblib', 'hydra.launcher.n_jobs=2', 'hydra.sweep.dir=sweep', 'hydra.sweep.subdir=${name}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    configs = [json.loads((tmp_path/'sweep'/m/'config.json').read_text()) for m in ('moe', 'moe_merge')]
    assert [c['method'] for c in configs] == ['moe', 'moe_merge'] and configs[0]['merge'] is None and configs[1]['merge']['combine'] == 'mean'

def test_a_rule_of_ones_own_is_one_function_and_one_option(tmp_path):
    (tmp_path/'my_rules.py').write_text('def task_arithmetic(states, counts, base):\n    return {n: base[n] + 0.5 * sum(s[n] - base[n] for s in states) for n in base}\n')
    done = command('moe-merge', *TINY, 'merge.combine=my_rules.task_arithmetic', 'experts.shared_init=true', 'merge.every=1', 'merge.until=1', 'hydra.run.dir=run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (tmp_path/'run'/'events.jsonl').read_text().splitlines()]
    assert sum(e['kind'] == 'merge' for e in events) > 0

@pytest.mark.parametrize('bad, says', [('experts.top_k=5', 'top_k is 5, but there are 4 experts'), ('experts.ranks=8', 'ranks'), ('method=moo', 'moo')])
def test_bad_settings_end_with_one_message_and_leave_nothing(tmp_path, bad, says):
    done = command('moe-merge', *TINY, bad, cwd=tmp_path)
    assert done.returncode != 0 and says in done.stderr and 'Traceback' not in done.stderr
    assert not list(tmp_path.rglob('config.json'))

def test_sigterm_ends_a_run_with_143_and_the_same_command_goes_on(tmp_path):
    long = [*TINY, 'train.iterations=400', 'save_every=1', 'hydra.run.dir=run']
    child = subprocess.Popen([str(Path(sys.executable).with_name('moe-merge')), *long], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'run'/'checkpoint.safetensors').is_file() and child.poll() is None: time.sleep(.05)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 143 and 'the same command goes on from' in said and 'Traceback' not in said
    assert command('moe-merge', *long, cwd=tmp_path).returncode == 0
    assert len((tmp_path/'run'/'matrix.csv').read_text().splitlines()) == 1 + 2 * 2 * 4 and not list((tmp_path/'run').glob('checkpoint*'))
