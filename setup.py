"""Everything about the package stands in pyproject.toml; the CUDA bodies in csrc/ travel as sources."""

from setuptools import setup

setup()
