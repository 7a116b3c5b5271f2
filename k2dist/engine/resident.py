"""What lies in a rank's slots against the same bytes laid out once more; what differs has its published name.

Kernels lay weights out anew, and not every layout has an inverse: the reference keeps dequantised float32 and
the two halves of kv_b. So the bytes are read a second time and given to the same `prepare_*`; the results
must be equal bit for bit, whatever the layout is, as long as it is made of dataclasses, tuples and tensors.
In an expert layout the slot comes first: as the index of a tuple, or as the leading dimension of a tensor.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from k2kernels import Experts
from torch import Tensor

from k2dist.model.weights import LaneWeights, Layer
from k2dist.parallel.published import SCALE_SUFFIX

# What each part of a layout holds: published names, whose rows follow one another.
_END_PARTS = {"embed_vD": ("model.embed_tokens",), "norm_D": ("model.norm",), "head_vD": ("lm_head",)}
_LAYER_PARTS = {
    "attention_norm_D": ("input_layernorm",),
    "attention.qkv_a": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    "attention.q_norm_Q": ("self_attn.q_a_layernorm",),
    "attention.kv_norm_L": ("self_attn.kv_a_layernorm",),
    "attention.q_b": ("self_attn.q_b_proj",),
    "attention.w_uk_hNL": ("self_attn.kv_b_proj",),
    "attention.w_uv_hLV": ("self_attn.kv_b_proj",),
    "attention.o": ("self_attn.o_proj",),
    "mlp_norm_D": ("post_attention_layernorm",),
    "mlp.router.w_ED": ("mlp.gate",),
    "mlp.router.bias_E": ("mlp.gate.e_score_correction_bias",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
    "mlp.shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.shared.down": ("mlp.shared_experts.down_proj",),
}
_EXPERT_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}

_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_Leaves = dict[str, Tensor]  # the tensors of a layout by the path of fields and indices to each


class SecondLook:
    """`tensors`: what was read again, by published name; `block`: of its scales, if there are any."""

    def __init__(self, tensors: Mapping[str, Tensor], block: int | None) -> None:
        self._tensors = tensors
        self._block = block

    def ends(self, resident: LaneWeights, again: LaneWeights) -> Iterator[str]:
        """Faults of embedding, last norm and head."""
        here, there = _leaves(resident), _leaves(again)
        here = {path: leaf for path, leaf in here.items() if not path.startswith("layers.")}
        _check_named(here, _END_PARTS)
        for part, names in _END_PARTS.items():
            yield from self._faults(_at(here, part), _at(there, part), names)

    def layer(self, resident: Layer, again: Layer, layer: int) -> Iterator[str]:
        """Faults of what one decoder layer holds besides experts."""
        here, there = _leaves(resident), _leaves(again)
        _check_named(here, _LAYER_PARTS)
        for part, names in _LAYER_PARTS.items():
            full = tuple(f"model.layers.{layer}.{name}" for name in names)
            yield from self._faults(_at(here, part), _at(there, part), full)

    def are_same(self, resident: Experts, again: Experts, first: int, num_slots: int) -> bool:
        """Whether slots [first, first + num_slots) hold what those of `again` do."""
        here, there = _leaves(resident), _leaves(again)
        _check_named(here, _EXPERT_PARTS)
        return all(_same(_in_slot(here, first + i), _in_slot(there, i)) for i in range(num_slots))

    def experts(self, resident: Experts, again: Experts, layer: int, slots: Sequence[int]) -> Iterator[str]:
        """Faults of the experts of one layer; `slots`: who should be in which."""
        here, there = _leaves(resident), _leaves(again)
        _check_named(here, _EXPERT_PARTS)
        wanted = [_in_slot(there, slot) for slot in range(len(slots))]
        for slot, expert in enumerate(slots):
            found = _in_slot(here, slot)
            if _same(found, wanted[slot]):
                continue
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            whose = [other for other, leaves in enumerate(wanted) if _same(found, leaves)]
            if whose:
                yield f"{name}: slot {slot} holds expert {slots[whose[0]]} in its place"
                continue
            for part, names in _EXPERT_PARTS.items():
                full = tuple(f"{name}.{linear}" for linear in names)
                yield from self._faults(_at(found, part), _at(wanted[slot], part), full)

    def _faults(self, here: _Leaves, there: _Leaves, names: tuple[str, ...]) -> Iterator[str]:
        weights = [name if name in self._tensors else f"{name}.weight" for name in names]
        if [_form(leaf) for leaf in here.values()] != [_form(leaf) for leaf in there.values()]:
            yield f"{' and '.join(weights)}: lies in memory in another form than its bytes give"
            return
        for path, found in here.items():
            if not _same_bits(found, there[path]):
                yield from self._tensor_faults(found, there[path], weights)

    def _tensor_faults(self, found: Tensor, wanted: Tensor, names: list[str]) -> Iterator[str]:
        """By published name where the layout's rows are those of `names`, one after the other."""
        rows = [len(self._tensors[name]) for name in names]
        if found.dim() != self._tensors[names[0]].dim() or len(found) != sum(rows):
            yield f"{' or '.join(names)}: {_differing(found, wanted)} in its layout"
            return
        for name, a, b in zip(names, found.split(rows), wanted.split(rows), strict=True):
            if not _same_bits(a, b):
                yield self._scale_fault(name, a, b) or f"{name}: {_differing(a, b)}"

    def _scale_fault(self, name: str, found: Tensor, wanted: Tensor) -> str | None:
        """Where dequantised values lie: all of a block are off by one factor, so it is by their scale."""
        if self._block is None or name + SCALE_SUFFIX not in self._tensors:
            return None
        row, col = (_bits(found) != _bits(wanted)).nonzero()[0].tolist()
        n, k = row // self._block, col // self._block
        rows = slice(n * self._block, (n + 1) * self._block)
        cols = slice(k * self._block, (k + 1) * self._block)
        is_set = wanted[rows, cols] != 0
        factor = found[rows, cols][is_set].double() / wanted[rows, cols][is_set].double()
        if len(factor) < 2 or not bool(((factor - factor[0]).abs() <= 1e-5 * factor[0].abs()).all()):
            return None
        return f"{name}{SCALE_SUFFIX}: [{n}, {k}] is {float(factor[0]):.6g} times what it should be in memory"


def _leaves(value: object, path: str = "") -> _Leaves:
    """Every tensor in a tree of dataclasses and tuples."""
    if isinstance(value, Tensor):
        return {path: value}
    children: list[tuple[str, object]] = []
    if isinstance(value, tuple):
        children = [(str(i), child) for i, child in enumerate(value)]
    elif dataclasses.is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    leaves: _Leaves = {}
    for name, child in children:
        leaves |= _leaves(child, f"{path}.{name}" if path else name)
    return leaves


def _at(leaves: _Leaves, part: str) -> _Leaves:
    return {path: leaf for path, leaf in leaves.items() if _is_in(path, part)}


def _is_in(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}.")


def _check_named(leaves: _Leaves, parts: Mapping[str, object]) -> None:
    """Nothing that lies in memory may go unchecked because its table above was forgotten."""
    nameless = [path for path in leaves if not any(_is_in(path, part) for part in parts)]
    assert not nameless, f"no published name for {nameless}"


def _in_slot(leaves: _Leaves, slot: int) -> _Leaves:
    """One expert's tensors, under paths without its number."""
    found: _Leaves = {}
    for path, leaf in leaves.items():
        steps = path.split(".")
        index = next((i for i, step in enumerate(steps) if step.isdigit()), None)
        if index is None:
            found[path] = leaf[slot]
        elif int(steps[index]) == slot:
            found[".".join(steps[:index] + steps[index + 1 :])] = leaf
    return found


def _same(here: _Leaves, there: _Leaves) -> bool:
    return here.keys() == there.keys() and all(_same_bits(here[path], there[path]) for path in here)


def _same_bits(here: Tensor, there: Tensor) -> bool:
    return _form(here) == _form(there) and _equal(here, there)


def _form(leaf: Tensor) -> tuple[torch.dtype, torch.Size]:
    return leaf.dtype, leaf.shape


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _equal(here: Tensor, there: Tensor) -> bool:
    """By the C library where that goes: 11 GB/s; torch compares element by element, 2.6 at best."""
    if here.device.type == there.device.type == "cpu" and here.is_contiguous() and there.is_contiguous():
        return bool(_LIBC.memcmp(here.data_ptr(), there.data_ptr(), here.nbytes) == 0)
    return torch.equal(_bits(here), _bits(there))


def _bits(leaf: Tensor) -> Tensor:
    """As integers: NaN equals itself, and -0 is not 0."""
    return leaf.view(_INTEGERS[leaf.element_size()])


def _differing(found: Tensor, wanted: Tensor) -> str:
    place = (_bits(found) != _bits(wanted)).nonzero()
    span = zip(place.amin(0).tolist(), place.amax(0).tolist(), strict=True)
    where = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in span)
    return f"{len(place)} values differ in memory, at [{where}]"
