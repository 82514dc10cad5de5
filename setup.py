"Package metadata comes from settings.ini, the only place where it is edited."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read('settings.ini', encoding='utf-8')
meta = ini['DEFAULT']
extras = {key.removesuffix('_requirements'): value.split() for key, value in meta.items() if key.endswith('_requirements')}

setup(
    name=meta['lib_name'], version=meta['version'], description=meta['description'], keywords=meta['keywords'],
    author=meta['author'], author_email=meta['author_email'], license='Apache-2.0', license_files=['LICENSE'],
    url=f"https://github.com/{meta['user']}/{meta['repo']}", python_requires=f">={meta['min_python']}",
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['selfclass', 'selfclass.*']), package_data={'selfclass': ['py.typed', '*.json', '*.json.gz']},
    install_requires=meta['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': meta['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3 :: Only'],
    zip_safe=False,
)
