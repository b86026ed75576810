"""Packaging. ``kernels/`` is installed as ``prefalign.kernels``, never as top-level ``kernels``.

Hugging Face publishes a package of that name and transformers imports it, so the mapping below is
what keeps the two apart; everything else is in ``pyproject.toml``.
"""

from setuptools import setup

setup(
    packages=["prefalign", "prefalign.benchmarks", "prefalign.integrations", "prefalign.kernels"],
    package_dir={"prefalign": "prefalign", "prefalign.kernels": "kernels"},
)
