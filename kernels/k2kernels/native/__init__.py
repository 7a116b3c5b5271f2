"""The kernels for CPUs: C++ (`kernels/native`), called through ctypes, one ISA's functions at a time."""

from k2kernels.native.library import ISAS, NoNativeKernelsError, load

__all__ = ["ISAS", "NoNativeKernelsError", "load"]
