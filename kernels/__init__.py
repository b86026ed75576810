"""The ops of prefalign, one to a page; installed as ``prefalign.kernels``.

This file stays a docstring: from the repository's root it can be imported by transformers in
place of Hugging Face's package ``kernels`` (see CONTRIBUTING.md). The public functions are
re-exported by ``prefalign``.
"""
