"""Triton kernels in files that import without Triton: it is loaded at the first launch.

    if TYPE_CHECKING:
        import triton.language as tl

    @jit
    def _double(x_ptr, y_ptr, N, TILE: tl.constexpr):
        at = tl.program_id(0) * TILE + tl.arange(0, TILE)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < N) * 2, mask=at < N)

    _double[(triton_grid,)](x, y, n, TILE=128)

A laptop then needs no Triton, and a process that launches nothing pays neither its 0.3 s nor its memory. At
the first launch `tl`, `INTERPRETED` and the kernels that a file names become Triton's own objects in that
file. Triton compiles a kernel, or interprets it on the CPU where TRITON_INTERPRET=1 is set at its first
launch and was set when Triton was imported.

`OPTIONS`: of every launch. A multiply and an add stay two roundings unless a kernel says `tl.fma`: whether
they are fused would else be the compiler's choice, tile by tile, and a row's bits with it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import FunctionType
from typing import Any

OPTIONS = {"enable_fp_fusion": False}
INTERPRETED = False  # for kernels: a constant of Triton's after the first launch


class Kernel:
    """A function in Triton's language, called by other kernels or launched as `kernel[grid](...)`."""

    def __init__(self, function: FunctionType, varies: tuple[str, ...] = ()) -> None:
        self.function = function
        self.varies = varies
        self._jitted: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launch: Callable[..., None] = self.jitted()[grid]
        return launch

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError(f"{self.function.__name__} is a Triton kernel: launch it, or call it from one")

    def jitted(self) -> Any:
        """Triton's object for this function."""
        if self._jitted is None:
            self._jitted = import_module("triton").jit(self.function, do_not_specialize=list(self.varies))
            _bind(self.function.__globals__)
        return self._jitted


def jit(function: Callable[..., Any]) -> Kernel:
    assert isinstance(function, FunctionType), "a kernel is a plain function"
    return Kernel(function)


def jit_varying(*names: str) -> Callable[[Callable[..., Any]], Kernel]:
    """As `jit`. The integers called `names` change with the batch, and no value of theirs is compiled for;
    nor is where pointers among them begin, which point into a batch's one tensor.

    Else Triton would compile once more for 1, for multiples of 16 and for addresses that are not, in the
    middle of serving.
    """

    def kernel(function: Callable[..., Any]) -> Kernel:
        assert isinstance(function, FunctionType), "a kernel is a plain function"
        return Kernel(function, names)

    return kernel


def _bind(scope: dict[str, Any]) -> None:
    """What Triton looks up by name in a kernel's file must be its own: its language, other kernels."""
    tl = import_module("triton.language")
    scope["tl"] = tl
    if "INTERPRETED" in scope:
        scope["INTERPRETED"] = tl.constexpr(import_module("triton").knobs.runtime.interpret)
    for name, value in list(scope.items()):
        if isinstance(value, Kernel):
            scope[name] = value.jitted()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1: the length of a tile's axis."""
    return 1 << (n - 1).bit_length()
