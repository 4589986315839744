"""Hands settings.ini, the one place for names, versions and requirements, to setuptools"""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
readme = here/'README.md'


class BuildWithNotebooks(build_py):
    "The package, and in it the notebooks that its commands run"
    def run(self):
        super().run()
        if self.editable_mode: return
        for folder in ('experiments', 'benchmarks', 'explore'):
            to = Path(self.build_lib)/'tokkit'/'notebooks'/folder
            to.mkdir(parents=True, exist_ok=True)
            for pattern in ('*.ipynb', '*.yaml'):
                for file in (here/'nbs'/folder).glob(pattern): shutil.copy(file, to)


setup(
    name=cfg['lib_name'], version=cfg['version'],
    description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    classifiers=[f"Intended Audience :: {cfg['audience']}", 'Development Status :: 3 - Alpha',
                 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['tokkit', 'tokkit.*']),
    package_data={'tokkit': ['py.typed', '*.json', '*.yml', '*.css', '*.js', '*.html']},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(),
                    'pretrained': cfg['pretrained_requirements'].split(),
                    'track': cfg['track_requirements'].split(),
                    'cluster': cfg['cluster_requirements'].split(),
                    'data': cfg['data_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    cmdclass={'build_py': BuildWithNotebooks},
    zip_safe=False,
)
