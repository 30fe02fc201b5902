"README.md from nbs/index.ipynb, and with --site one HTML page per notebook in _docs/, by nbconvert alone."
import re
import sys
from pathlib import Path
import nbformat
from execnb.nbio import nb2str
from nbconvert import Exporter, HTMLExporter, MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbdev.config import Config, get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

HIDDEN = {'hide', 'default_exp'}
LINK = re.compile(r'\]\((?!https?:|#)([\w./-]+)\.ipynb\)')  # between notebooks, relative

def for_readers(
    path: Path,
    link: str,  # what a link between notebooks becomes, as in `re.sub`
) -> nbformat.NotebookNode:
    "The notebook without `#| hide` cells and directive lines; `#| hide_input` cells keep outputs only."
    nb = NBProcessor(path, process=True).nb
    nb.cells = [c for c in nb.cells if not (HIDDEN & c.directives_.keys())]
    for c in nb.cells:
        if 'hide_input' in c.directives_: c.metadata['tags'] = ['hide_input']
        if c.cell_type == 'markdown': c.source = LINK.sub(link, c.source)
        for data in [o['data'] for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]:
            data['text/markdown'] = LINK.sub(link, ''.join(data['text/markdown']))
    page = nbformat.reads(nb2str(nb), as_version=4)
    page.metadata.language_info = {'name': 'python'}
    return TagRemovePreprocessor(enabled=True, remove_input_tags={'hide_input'}).preprocess(page, {})[0]

def rendered(
    exporter: Exporter,
    path: Path,
    link: str,
    stem: str,  # of the page
) -> tuple[str, dict]:
    "Text of the page and its extra files."
    about = {'metadata': {'name': path.stem}, 'output_files_dir': f'{stem}_files'}
    return exporter.from_notebook_node(for_readers(path, link), about)

def readme(cfg: Config) -> str:
    "README.md as the index notebook says it."
    text, _ = rendered(MarkdownExporter(), cfg.nbs_path/cfg.readme_nb, r'](nbs/\1.ipynb)', 'README')
    return re.sub(r'\n{3,}', '\n\n', text.replace('](../', '](')).strip() + '\n'

def write_site(cfg: Config):
    "One page per notebook."
    for p in nbglob(as_path=True):
        exporter = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True)
        out = cfg.doc_path/p.relative_to(cfg.nbs_path).with_suffix('.html')
        text, res = rendered(exporter, p, r'](\1.html)', out.stem)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding='utf-8')
        for name, data in (res['outputs'] or {}).items():
            (out.parent/name).parent.mkdir(parents=True, exist_ok=True)
            (out.parent/name).write_bytes(data)

if __name__ == '__main__':
    cfg = get_config()
    (cfg.config_path/'README.md').write_text(readme(cfg), encoding='utf-8')
    if '--site' in sys.argv: write_site(cfg)
