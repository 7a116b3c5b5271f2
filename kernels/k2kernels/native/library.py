"""The shared library of CPU kernels: found, loaded and typed. `kernels/native/abi.h` is its other side.

It is built when the package is installed, if there is a C++ compiler. Without it `load` says why not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "libk2native.so"
FP8, BF16 = 0, 1  # elements of packed weights
ROWS_BF16, ROWS_E4M3 = 0, 1
OUT_BF16, OUT_F32 = 0, 1
ISAS = ("avx2", "avx512", "avx512_bf16", "amx")  # worst first


class Packed(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("are_acts_quantised", c_int32),
        ("block", c_int32),
        ("num_panels", c_int32),
        ("num_blocks", c_int32),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("panel_bytes", c_int64),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("column", c_void_p),
        ("width", c_void_p),
    )


class Rows(Structure):
    _fields_ = (
        ("kind", c_int32),
        ("num_rows", c_int64),
        ("stride_bytes", c_int64),
        ("data", c_void_p),
        ("scale_stride_bytes", c_int64),
        ("scale", c_void_p),
        ("index", c_void_p),
    )


class Cache(Structure):
    _fields_ = (("data", c_void_p), ("width", c_int64), ("page_tokens", c_int64))


class Decode(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("num_rows", c_int64),
        ("num_heads", c_int64),
        ("q_row_stride", c_int64),
        ("cache", Cache),
        ("pages", c_void_p),
        ("page_stride", c_int64),
        ("length", c_void_p),
        ("latent_width", c_int64),
        ("scale", c_float),
        ("out", c_void_p),
    )


class Prefill(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("num_rows", c_int64),
        ("num_heads", c_int64),
        ("nope", c_int64),
        ("rope", c_int64),
        ("q_row_stride", c_int64),
        ("q_head_stride", c_int64),
        ("cache", Cache),
        ("pages", c_void_p),
        ("start", c_int64),
        ("w_uk", POINTER(Packed)),
        ("w_uv", POINTER(Packed)),
        ("scale", c_float),
        ("out", c_void_p),
    )


class TopkRule(Structure):
    _fields_ = (
        ("top_k", c_int64),
        ("num_groups", c_int64),
        ("top_k_groups", c_int64),
        ("normalises", c_int32),
        ("scale", c_float),
    )


class AttentionArgs(Structure):
    _fields_ = (
        ("qkv_a", POINTER(Packed)),
        ("q_b", POINTER(Packed)),
        ("w_uk", POINTER(Packed)),
        ("w_uv", POINTER(Packed)),
        ("o", POINTER(Packed)),
        ("q_norm", c_void_p),
        ("kv_norm", c_void_p),
        ("num_heads", c_int64),
        ("q_rank", c_int64),
        ("latent", c_int64),
        ("nope", c_int64),
        ("rope", c_int64),
        ("value", c_int64),
        ("eps", c_float),
        ("scale", c_float),
    )


class GeneratedArgs(Structure):
    _fields_ = (
        ("num_rows", c_int64),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("position", c_void_p),
        ("place", c_void_p),
        ("length", c_void_p),
        ("pages", c_void_p),
        ("page_stride", c_int64),
        ("page_tokens", c_int64),
    )


class MoeArgs(Structure):
    _fields_ = (
        ("shared_gate_up", POINTER(Packed)),
        ("shared_down", POINTER(Packed)),
        ("gate_up", POINTER(Packed)),
        ("down", POINTER(Packed)),
        ("router", c_void_p),
        ("bias", c_void_p),
        ("slot", c_void_p),
        ("num_experts", c_int64),
        ("num_slots", c_int64),
        ("rule", TopkRule),
    )


class LayerArgs(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("attention", AttentionArgs),
        ("gate_up", POINTER(Packed)),
        ("down", POINTER(Packed)),
        ("moe", MoeArgs),
        ("cache", c_void_p),
        ("counts", c_void_p),
    )


_I, _L, _P, _F = c_int, c_int64, c_void_p, c_float
# Functions of one ISA, in the order of K2Ops; after the number of threads, their arguments.
_OPS: dict[str, tuple[Any, ...]] = {
    "linear": (POINTER(Packed), _L, _P, POINTER(Rows), _P, _I, _L),
    "mlp": (POINTER(Packed), POINTER(Packed), _L, _P, POINTER(Rows), _P, _I),
    "act_quant": (_P, _L, _L, _L, _I, _P, _L, _P, _L),
    "rmsnorm": (_P, _P, _L, _L, _L, _F, _P, _L),
    "rope": (_P, _L, _L, _L, _L, _L, _P, _P, _P, _L, _L),
    "swiglu": (_P, _L, _L, _P),
    "weighted_sum": (_P, _P, _P, _L, _L, _L, _P, _I),
    "latent_write": (_P, _L, _P, _L, _P, _L, _L, _P, _L),
    "heads": (POINTER(Packed), _P, _L, _L, _L, _L, _P, _L, _L),
    "router_logits": (_P, _L, _L, _L, _P, _L, _P),
    "router_topk": (_P, _P, _L, _L, POINTER(TopkRule), _P, _P),
    "mla_decode": (POINTER(Decode),),
    "mla_prefill": (POINTER(Prefill),),
    "attention": (POINTER(AttentionArgs), POINTER(GeneratedArgs), _P, _L, _P, _P),
    "moe": (POINTER(MoeArgs), _P, _L, _L, _P, _P, _P),
    "layers": (POINTER(LayerArgs), _L, _P, _L, _F, POINTER(GeneratedArgs), _P, _P, _P),
}


class _OpsTable(Structure):
    _fields_ = tuple((name, c_void_p) for name in _OPS)


@dataclass(frozen=True, slots=True)
class Isa:
    """One way that this machine can run the kernels; `call`: its functions by name."""

    name: str
    call: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Library:
    """`isas`: those of this machine, worst first. `build`: sources and compiler, for fingerprints."""

    build: str
    isas: dict[str, Isa]
    pack: Any
    advise: Any

    @property
    def best(self) -> Isa:
        return list(self.isas.values())[-1]


class NoNativeKernelsError(Exception):
    """The library was not built, or this machine cannot run it; the message says which."""


@functools.cache
def load() -> Library:
    """The library; NoNativeKernelsError says why there is none."""
    path = Path(__file__).parent / NAME
    if not path.exists():
        raise NoNativeKernelsError(
            f"{NAME} was not built when k2dist was installed: install a C++ compiler (g++ or clang++) for "
            "x86-64 Linux, then k2dist again"
        )
    try:
        shared = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoNativeKernelsError(f"{path} cannot be loaded on {sys.platform}: {error}") from error
    if _caller(shared) != hashlib.sha256(Path(__file__).read_bytes()).hexdigest():
        raise NoNativeKernelsError(f"{path} is of another version of k2dist: install k2dist again")
    shared.k2_build.restype = ctypes.c_char_p
    shared.k2_ops.restype = POINTER(_OpsTable)
    shared.k2_pack.argtypes = (_I, _I, _I, _I, _I, _P, _P, _L, _L, _L, _I, _I, _P, _P, _P, _L, _P, _P)
    shared.k2_pack.restype = _I
    shared.k2_advise.argtypes = (_P, _L)
    shared.k2_advise.restype = None
    mask = shared.k2_isas()
    isas = {}
    for number, name in enumerate(ISAS):
        table = shared.k2_ops(number) if mask >> number & 1 else None
        if table:
            isas[name] = Isa(name, _functions(table.contents))
    if not isas:
        raise NoNativeKernelsError("this processor has no AVX2")
    return Library(shared.k2_build().decode(), isas, shared.k2_pack, shared.k2_advise)


def _caller(shared: ctypes.CDLL) -> str | None:
    """Checksum of the file that the library was built to be called by: this one, or a call would crash."""
    if not hasattr(shared, "k2_caller"):
        return None
    shared.k2_caller.restype = ctypes.c_char_p
    checksum: bytes = shared.k2_caller()
    return checksum.decode()


def _functions(table: _OpsTable) -> dict[str, Any]:
    return {
        name: ctypes.CFUNCTYPE(None, c_int, *arguments)(getattr(table, name))
        for name, arguments in _OPS.items()
    }
