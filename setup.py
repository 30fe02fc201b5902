"All metadata lives in settings.ini; this file only hands it to setuptools."
import json
import shlex
from configparser import ConfigParser
from pathlib import Path
import setuptools
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {name: shlex.split(cfg[f'{name}_requirements'])
          for name in ('dev', 'report', 'hf', 'pretrain', 'track', 'oracle', 'ray', 'slurm')}
notebooks = f"{cfg['lib_name']}.notebooks"  # the figure notebooks travel in the wheel: `moe-merge-report` runs them


def without_outputs(text):
    "The text of a notebook, without what its cells have shown."
    nb = json.loads(text)
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = []
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'

class Build(build_py):
    "The figure notebooks travel without their outputs: the report makes them anew."
    def run(self):
        super().run()
        if self.editable_mode: return                                           # then they are the sources themselves
        for path in Path(self.build_lib, *notebooks.split('.')).glob('*.ipynb'):
            path.write_text(without_outputs(path.read_text(encoding='utf-8')), encoding='utf-8')


setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE', 'NOTICE'],
    keywords=cfg['keywords'].split(),
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: ' + cfg['audience']],
    python_requires='>=' + cfg['min_python'],
    packages=[*setuptools.find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), notebooks],
    package_dir={notebooks: 'nbs/figures'},
    package_data={cfg['lib_name']: shlex.split(cfg['package_data']), notebooks: ['*.ipynb']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={
        'console_scripts': shlex.split(cfg['console_scripts']),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={'build_py': Build},
    zip_safe=False,
)
