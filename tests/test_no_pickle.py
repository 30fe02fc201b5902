"A checkpoint from elsewhere cannot run code: nothing that a run reads or writes is a pickle."
import re
from pathlib import Path
import moe_merge_nb

ALLOWED = {
    'weights.py': {'torch.load'},  # other people's files, with weights_only=True: it builds tensors and calls nothing
    'pretrain.py': {'torch.load', 'torch.save'},  # its own files, weights_only=True too
    'miniature.py': {'pickle'},  # CIFAR's format, written for tests
}
CALLS = [
    r'torch\.load',
    r'torch\.save',
    r'\bc?pickle\b(?=[.]|$)',
    r'joblib\.load',
    r'allow_pickle=True',
    r'\beval\(',
    r'\bexec\(',
]
SAFE = r'torch\.load(?:\([^)]*weights_only=True|\(weights_only=True)'

def test_no_module_of_a_run_knows_pickle():
    for path in Path(moe_merge_nb.__file__).parent.rglob('*.py'):
        code = '\n'.join(line.split('#')[0] for line in path.read_text().splitlines())
        found = set(re.findall('|'.join(CALLS), code)) - {'eval('}
        assert found <= ALLOWED.get(path.name, set()), (path.name, found)
        assert code.count('torch.load') == len(re.findall(SAFE, code)), path.name
