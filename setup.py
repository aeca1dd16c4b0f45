"""For tools that ask for it; all is said in pyproject.toml."""

from setuptools import setup

setup()
