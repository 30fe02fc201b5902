"README.md from nbs/index.ipynb, and with --site one HTML page per notebook in _docs/, by nbconvert alone (no quarto)."
import sys
from pathlib import Path
from execnb.nbio import nb2str
from nbconvert import HTMLExporter, MarkdownExporter
import nbformat
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

HIDDEN = {'hide', 'default_exp'}

def for_readers(path):
    "The notebook at `path` without its `#| hide` cells and directive lines; code, prose and stored outputs stay"
    nb = NBProcessor(path, process=True).nb
    nb.cells = [c for c in nb.cells if not (HIDDEN & c.directives_.keys())]
    return nbformat.reads(nb2str(nb), as_version=4)

def write(exporter, path, out):
    text, res = exporter.from_notebook_node(for_readers(path), {'metadata': {'name': path.stem}, 'output_files_dir': f'{out.stem}_files'})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding='utf-8')
    for name, data in (res['outputs'] or {}).items():
        (out.parent/name).parent.mkdir(parents=True, exist_ok=True)
        (out.parent/name).write_bytes(data)

if __name__ == '__main__':
    cfg = get_config()
    write(MarkdownExporter(), cfg.nbs_path/cfg.readme_nb, cfg.config_path/'README.md')
    if '--site' in sys.argv:
        for p in nbglob(as_path=True): write(HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True), p, cfg.doc_path/p.relative_to(cfg.nbs_path).with_suffix('.html'))
