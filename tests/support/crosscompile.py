"""The cross-compiler under the name that tests import; the bench script uses it too."""

from prefalign.kernels._crosscompile import SHARED_LIMIT, TARGETS, Resources, compile_kernel

__all__ = ["SHARED_LIMIT", "TARGETS", "Resources", "compile_kernel"]
