"Package metadata: read from `settings.ini`, so that every fact is written once"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(name):
    "The non-empty lines of the setting `name`"
    return [line.strip() for line in settings[name].splitlines() if line.strip()]


EXTRA = "_requirements"
setup(
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    license_expression=settings["license"],
    license_files=["LICENSE"],
    author=settings["author"],
    python_requires=f">={settings['min_python']}",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["sumix_nb", "sumix_nb.*"]),
    package_data={"sumix_nb.training": ["*.csv"]},
    install_requires=lines("requirements"),
    extras_require={key.removesuffix(EXTRA): lines(key) for key in settings if key.endswith(EXTRA)},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['name']} = {settings['name']}._modidx:d"],
    },
)
