"A checkpoint from elsewhere cannot run code: nothing that a run reads or writes is a pickle."
import re
from pathlib import Path
import moe_merge_nb

# `theirs` reads other people's .pt files and `pretrain` its own, both with weights_only=True, which builds tensors and calls nothing; `miniature` writes CIFAR's format for tests
ALLOWED = {'theirs.py': {'torch.load'}, 'pretrain.py': {'torch.load', 'torch.save'}, 'miniature.py': {'pickle'}}

def test_no_module_of_a_run_knows_pickle():
    for path in Path(moe_merge_nb.__file__).parent.rglob('*.py'):
        code = '\n'.join(line.split('#')[0] for line in path.read_text().splitlines())
        found = set(re.findall(r'torch\.load|torch\.save|\bc?pickle\b(?=[.]|$)|joblib\.load|allow_pickle=True|\beval\(|\bexec\(', code)) - {'eval('}
        assert found <= ALLOWED.get(path.name, set()), (path.name, found)
        assert code.count('torch.load') == len(re.findall(r'torch\.load(?:\([^)]*weights_only=True|\(weights_only=True)', code)), path.name
