"""The one thing pyproject.toml cannot say: the top-level folder `kernels` is imported as `mdit.kernels`.

(`kernels` alone is the name of a well-known package.)
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["mdit", "mdit.*"])
    + ["mdit.kernels"]
    + ["mdit.kernels." + name for name in find_packages("kernels")],
    package_dir={"mdit": "mdit", "mdit.kernels": "kernels"},
)
