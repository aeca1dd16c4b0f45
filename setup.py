"""Doorway to pyproject.toml, which says all, for tools that ask for a setup.py."""

from setuptools import setup

setup()
