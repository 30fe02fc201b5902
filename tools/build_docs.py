"""README.md from nbs/index.ipynb; with --site also the site of all pages in _docs/, which needs no network to be read.

The site is made by mkdocs-material: chapters as a tree, search, previous and next. Formulas become MathML on the way.
A link that leads nowhere is an error."""
import ast
import logging
import re
import shutil
import sys
from pathlib import Path
import nbformat
from execnb.nbio import nb2str
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from nbdev.config import Config, get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

HIDDEN = {'hide', 'default_exp'}
LINK = re.compile(r'\]\((?!https?:|#)([\w./-]+)\.ipynb(#[\w-]+)?\)') # between notebooks, relative
OUTSIDE = re.compile(r'\]\((?!https?:|#)((?:\.\./)*)([\w./-]+?)/?\)') # of nbs/, relative
FORMULA = re.compile(r'(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\\w$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])', re.S)
SHIM = 'https://unpkg.com/iframe-worker/shim' # what mkdocs-material loads, and ours is in its place
BLOCK = re.compile(r'```python\n(.*?)```', re.S) # of code
FOLD = '<details class="imports" markdown="1"><summary>imports</summary>\n\n', '\n\n</details>'
CHAPTERS = ('figures', 'run', 'safe', 'cost') # after the numbered ones

def for_readers(
    path:Path,
    link:str, # what a link between notebooks becomes, as in `re.sub`
)->nbformat.NotebookNode:
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
    page:nbformat.NotebookNode, # see `for_readers`
    stem:str, # of its file
)->tuple[str, dict[str, bytes]]:
    "Markdown text of a page, and its pictures."
    about = {'metadata': {'name': stem}, 'output_files_dir': f'{stem}_files'}
    text, resources = MarkdownExporter().from_notebook_node(page, about)
    return text, resources['outputs'] or {}

def readme(cfg:Config)->tuple[str, dict[str, bytes]]:
    "README.md as the index notebook says it, and its pictures."
    text, pictures = rendered(for_readers(cfg.nbs_path/cfg.readme_nb, r'](nbs/\1.ipynb\2)'), 'README')
    text = text.replace('](../', '](').replace('](images/', '](nbs/images/')
    text = re.sub(r'(?m)^ +$', '', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', pictures

def write_readme(cfg:Config):
    "README.md and the folder README_files."
    text, pictures = readme(cfg)
    shutil.rmtree(cfg.config_path/'README_files', ignore_errors=True)
    (cfg.config_path/'README_files').mkdir()
    (cfg.config_path/'README.md').write_text(text, encoding='utf-8')
    for name, data in pictures.items(): (cfg.config_path/name).write_bytes(data)

def converted(
    formula:str, # LaTeX
    **how,
)->str: # MathML
    "ValueError for a command that the converter does not know: it would stand there as text."
    known = re.sub(r'\\[bB]igg?[lrm]?(?![A-Za-z])', '', formula) # MathML stretches by itself
    known = known.replace(r'\arg', r'\operatorname{arg}')
    made = convert(known, **how)
    if '\\' not in made: return made
    raise ValueError(f'{formula!r} becomes {made!r}: write it without the command that is left over')

def mathml(found:re.Match)->str:
    "One of `FORMULA`: code stays as it is."
    code, display, inline = found.groups()
    if code: return code
    if display: return f'\n\n<div>{converted(display.strip(), display="block")}</div>\n\n'
    return f'<span>{converted(inline)}</span>' # in a span: a line may begin with it

def for_site(
    cfg:Config,
    path:Path, # of a notebook
)->nbformat.NotebookNode:
    "The page with formulas as MathML; what lies outside of nbs/ is linked in the repository."
    page = for_readers(path, r'](\1.md\2)')
    def outside(found):
        target = (path.parent/found[1]/found[2]).resolve()
        if target.is_relative_to(cfg.nbs_path): return found[0]
        kind = 'tree' if target.is_dir() else 'blob'
        return f']({cfg.git_url}/{kind}/{cfg.branch}/{target.relative_to(cfg.config_path).as_posix()})'
    for c in page.cells:
        if c.cell_type == 'markdown': c.source = FORMULA.sub(mathml, OUTSIDE.sub(outside, c.source))
    return page

def title(path:Path)->str: # of a notebook
    "Its first headline."
    cells = nbformat.read(path, as_version=4).cells
    return next(c.source for c in cells if c.cell_type == 'markdown').splitlines()[0].lstrip('# ')

def navigation(
    cfg:Config,
    pages:list[Path],
)->list[dict]:
    "The tree of the site: the README, the tour, the chapters in order of reading, then the workshop."
    folders = {p.parent.relative_to(cfg.nbs_path).as_posix() for p in pages}
    numbered = sorted((f for f in folders if f[0].isdigit()), key=lambda f: int(f.split('_')[0]))
    def entry(p): return {title(p): p.relative_to(cfg.nbs_path).with_suffix('.md').as_posix()}
    def chapter(f): return [entry(p) for p in pages if p.parent == cfg.nbs_path/f]
    top = [entry(p) for p in pages if p.parent == cfg.nbs_path and p.name != cfg.readme_nb]
    first = [{'moe_merge_nb': Path(cfg.readme_nb).with_suffix('.md').as_posix()}, *top]
    return first + [{f.replace('_', ' '): chapter(f)} for f in (*numbered, *CHAPTERS)]

def only_imports(code:str)->bool:
    "Is there nothing else in it?"
    try: body = ast.parse(code).body
    except SyntaxError: return False # a magic
    return bool(body) and all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in body)

def imports_folded(
    text:str, # Markdown of a page
)->str:
    "Blocks of nothing but imports are closed until a reader opens them; neighbours are one."
    def fold(found): return found[0].join(FOLD) if only_imports(found[1]) else found[0]
    begin, end = map(re.escape, FOLD)
    return re.sub(rf'{end}\s+{begin}', '\n\n', BLOCK.sub(fold, text))

def write_pages(
    cfg:Config,
    pages:list[Path],
    out:Path,
):
    "Markdown and pictures of all pages."
    for p in pages:
        to = out/p.relative_to(cfg.nbs_path).with_suffix('.md')
        text, pictures = rendered(for_site(cfg, p), p.stem)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(imports_folded(text), encoding='utf-8')
        for name, data in pictures.items():
            (to.parent/name).parent.mkdir(parents=True, exist_ok=True)
            (to.parent/name).write_bytes(data)
    shutil.copytree(cfg.nbs_path/'images', out/'images', dirs_exist_ok=True)
    shutil.copytree(cfg.config_path/'tools'/'site', out, dirs_exist_ok=True)

def write_site(cfg:Config):
    "The site in _docs/; SystemExit where a link leads nowhere."
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    logging.basicConfig(level=logging.WARNING, format='%(message)s')
    source = cfg.config_path/'_proc'/'site'
    shutil.rmtree(source, ignore_errors=True)
    pages = sorted(nbglob(as_path=True))
    write_pages(cfg, pages, source)
    config = load_config(
        str(cfg.config_path/'mkdocs.yml'), docs_dir=str(source), site_dir=str(cfg.doc_path),
        nav=navigation(cfg, pages), strict=True)
    config.plugins.on_startup(command='build', dirty=False)
    build(config)
    for page in cfg.doc_path.rglob('*.html'):
        root = '../' * (len(page.relative_to(cfg.doc_path).parts) - 1)
        page.write_text(page.read_text(encoding='utf-8').replace(SHIM, f'{root}worker.js'), encoding='utf-8')

if __name__ == '__main__':
    cfg = get_config()
    write_readme(cfg)
    if '--site' in sys.argv: write_site(cfg)
