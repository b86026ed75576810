"""The version, alone, so that packaging and ``prefalign --version`` need not import torch."""

__version__ = "0.1.0"
