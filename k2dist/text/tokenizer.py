"""K2's byte-pair tokenizer: a `tiktoken.model` of any size, followed by 256 special ids.

Ids [0, num_base) are the vocabulary file's ranks, ids [num_base, num_base + 256) are special, named by
`tokenizer_config.json`; nothing lies above. A special string inside text stays text unless the caller
says otherwise, so no user can write a control token.
Source: Kimi K2's tokenization_kimi.py and tokenizer_config.json (k2_facts 4.1-4.3, 4.6).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tiktoken

from k2dist.errors import CheckpointError, RequestError

VOCABULARY_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
NUM_SPECIALS = 256

BOS, EOS, EOT = "[BOS]", "[EOS]", "[EOT]"
IM_END, IM_MIDDLE = "<|im_end|>", "<|im_middle|>"
IM_USER, IM_ASSISTANT, IM_SYSTEM = "<|im_user|>", "<|im_assistant|>", "<|im_system|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENTS, CALL_END = (
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)

# Offset above num_base -> name. Template, stop set and tool calls need all but the last two and the headers.
K2_SPECIALS: Mapping[int, str] = MappingProxyType(
    {
        0: BOS,
        1: EOS,
        2: IM_END,
        3: IM_USER,
        4: IM_ASSISTANT,
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: EOT,
        10: IM_SYSTEM,
        11: SECTION_BEGIN,
        12: SECTION_END,
        13: CALL_BEGIN,
        14: CALL_ARGUMENTS,
        15: CALL_END,
        17: IM_MIDDLE,
        254: "[UNK]",
        255: "[PAD]",
    }
)
_REQUIRED = frozenset(K2_SPECIALS.values()) - {"<|start_header_id|>", "<|end_header_id|>", "[UNK]", "[PAD]"}

# Tried in this order. `&&` is Rust's class intersection: tiktoken's engine knows it, Python's `re` does not.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# tokenization_kimi.py encodes longer text piece by piece; ids near a cut depend on it, so the cuts are kept.
_PIECE_CHARS = 400_000
_RUN_CHARS = 25_000
_RUN = re.compile(r"\s+|\S+")


class Fragment(NamedTuple):
    """A stretch of a prompt: the name of one special token (`is_control`), or text that is only text."""

    text: str
    is_control: bool


class Tokenizer:
    """Text to ids and back. Immutable and safe to share between threads.

    `vocabulary[rank]` is a token's bytes and must hold all 256 single bytes; `specials` maps ids in
    [len(vocabulary), len(vocabulary) + 256) to names, and unnamed ids become `<|reserved_token_{id}|>`.
    Raises CheckpointError for anything else.
    """

    def __init__(self, vocabulary: Sequence[bytes], specials: Mapping[int, str]) -> None:
        self.num_base = len(vocabulary)
        ranks = _rank_tokens(vocabulary)
        self._special_ids = _name_specials(self.num_base, specials)
        self._bytes = [*vocabulary, *(name.encode() for name in self._special_ids)]
        self._text_bytes = [*vocabulary, *(b"" for _ in self._special_ids)]
        self._bpe = tiktoken.Encoding(
            "kimi_k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self._special_ids
        )

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json`; CheckpointError names file and line."""
        vocabulary = read_vocabulary(model_dir / VOCABULARY_FILE)
        specials = read_specials(model_dir / CONFIG_FILE, len(vocabulary))
        return cls(vocabulary, specials)

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id; the model's embedding has at least as many rows."""
        return len(self._bytes)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. `allow_special`: the name of a special in it becomes its id."""
        encode = self._encode_with_specials if allow_special else self._bpe.encode_ordinary
        return [token_id for piece in _slices(text, _cuts(text)) for token_id in encode(piece)]

    def encode_fragments(self, fragments: Iterable[Fragment]) -> list[int]:
        """Ids of a prompt; only control fragments yield special ids.

        Equal to `encode("".join(texts), allow_special=True)` where no text holds the name of a special:
        neighbouring texts are one text to the BPE, and cuts are counted from the prompt's start. (The one
        exception: a cut that falls inside a control token, which the reference breaks and this keeps.)
        """
        joined = _join_texts(fragments)
        cuts = _cuts("".join(fragment.text for fragment in joined))
        ids: list[int] = []
        start = 0
        for text, is_control in joined:
            if is_control:
                ids.append(self.special_id(text))
            else:
                inside = [cut - start for cut in cuts if start < cut < start + len(text)]
                for piece in _slices(text, inside):
                    ids.extend(self._bpe.encode_ordinary(piece))
            start += len(text)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes, perhaps part of a character; a special's are its name."""
        self._check(token_id)
        return self._bytes[token_id]

    def text_bytes(self, token_id: int) -> bytes:
        """A token's bytes as text: none for a special. Stop strings are matched on these."""
        self._check(token_id)
        return self._text_bytes[token_id]

    def decode_bytes(self, token_ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The tokens' bytes in a row; `skip_special` leaves out all 256 specials, tool markers too."""
        return b"".join(map(self.text_bytes if skip_special else self.token_bytes, token_ids))

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """As `decode_bytes`, with U+FFFD for what is not UTF-8."""
        return self.decode_bytes(token_ids, skip_special=skip_special).decode(errors="replace")

    def special_id(self, name: str) -> int:
        """Id of the special called `name`; CheckpointError if this model has none."""
        token_id = self._special_ids.get(name)
        if token_id is None:
            raise CheckpointError(f"{CONFIG_FILE}: added_tokens_decoder names no token {name!r}; add it")
        return token_id

    @property
    def special_names(self) -> tuple[str, ...]:
        """Of all 256, in the order of their ids."""
        return tuple(self._special_ids)

    def is_special(self, token_id: int) -> bool:
        return self.num_base <= token_id < len(self._bytes)

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < len(self._bytes):
            raise RequestError("token_ids", f"{token_id} is outside 0..{len(self._bytes) - 1}")

    def _encode_with_specials(self, text: str) -> list[int]:
        ids: list[int] = self._bpe.encode(text, allowed_special="all")
        return ids


def end_token_ids(tokenizer: Tokenizer, eos_token_ids: int | Iterable[int] | None) -> frozenset[int]:
    """Every id that ends an answer: generation_config's `eos_token_id`, [EOS], <|im_end|> and [EOT].

    The configured ones alone are not enough: K2's config.json names [EOS], while turns end in <|im_end|>.
    """
    named = {tokenizer.special_id(name) for name in (EOS, IM_END, EOT)}
    if eos_token_ids is None:
        return frozenset(named)
    configured = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids)
    return frozenset(named | configured)


def read_vocabulary(path: Path) -> list[bytes]:
    """Token bytes by rank, from lines of `base64 rank` whose ranks count up from 0."""
    vocabulary: list[bytes] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        fields = line.split()
        try:
            if len(fields) != 2:
                raise ValueError(f"has {len(fields)} fields")
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number}: {error}; need `base64 rank`") from error
        if rank != number - 1:
            raise CheckpointError(
                f"{path}: line {number}: rank {rank}, need {number - 1}: ranks count up from 0"
            )
        if not token:
            raise CheckpointError(f"{path}: line {number}: an empty token; give it at least one byte")
        vocabulary.append(token)
    if len(vocabulary) < 256:
        raise CheckpointError(f"{path}: {len(vocabulary)} tokens, need at least the 256 single bytes")
    return vocabulary


def read_specials(path: Path, num_base: int) -> dict[int, str]:
    """Names of special ids from `added_tokens_decoder`; those that chat and tool calls need must be there."""
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    table = config.get("added_tokens_decoder") if isinstance(config, dict) else None
    if not isinstance(table, dict):
        raise CheckpointError(f'{path}: needs an object "added_tokens_decoder" of id -> {{"content": name}}')
    specials: dict[int, str] = {}
    for key, entry in table.items():
        where = f"{path}: added_tokens_decoder.{key}"
        name = entry.get("content") if isinstance(entry, dict) else None
        if not key.isascii() or not key.isdecimal():
            raise CheckpointError(f"{where}: the key must be a token id in decimal")
        if not isinstance(name, str) or not name:
            raise CheckpointError(f'{where}: needs "content", the name of the token')
        if not num_base <= int(key) < num_base + NUM_SPECIALS:
            raise CheckpointError(
                f"{where}: special ids are {num_base}..{num_base + NUM_SPECIALS - 1}, "
                f"the {NUM_SPECIALS} after the {num_base} of {VOCABULARY_FILE}; correct one of the two files"
            )
        specials[int(key)] = name
    missing = sorted(_REQUIRED - set(specials.values()))
    if missing:
        raise CheckpointError(f"{path}: added_tokens_decoder names no token {', '.join(missing)}; add them")
    return specials


def _rank_tokens(vocabulary: Sequence[bytes]) -> dict[bytes, int]:
    """Token -> rank; every token once, all single bytes among them, so that any text can be encoded."""
    ranks = {token: rank for rank, token in enumerate(vocabulary)}
    if len(ranks) != len(vocabulary):
        first = next(rank for rank, token in enumerate(vocabulary) if ranks[token] != rank)
        other = ranks[vocabulary[first]]
        raise CheckpointError(f"{VOCABULARY_FILE}: tokens {first} and {other} are the same bytes; drop one")
    absent = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if absent:
        raise CheckpointError(f"{VOCABULARY_FILE}: no token for the single byte 0x{absent[0]:02x}; add it")
    return ranks


def _name_specials(num_base: int, specials: Mapping[int, str]) -> dict[str, int]:
    """Name -> id of all 256, in the order of their ids."""
    ids = range(num_base, num_base + NUM_SPECIALS)
    outside = sorted(set(specials) - set(ids))
    if outside:
        raise CheckpointError(f"special id {outside[0]}: special ids are {ids.start}..{ids.stop - 1}")
    named: dict[str, int] = {}
    for token_id in ids:
        name = specials.get(token_id, f"<|reserved_token_{token_id}|>")
        if name in named:
            both = f"{named[name]} and {token_id}"
            raise CheckpointError(f"{CONFIG_FILE}: {name!r} names both tokens {both}; rename one")
        named[name] = token_id
    return named


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the model directory must hold it") from error


def _join_texts(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The same prompt with neighbouring texts made one."""
    joined: list[Fragment] = []
    for fragment in fragments:
        if not fragment.is_control and joined and not joined[-1].is_control:
            joined[-1] = Fragment(joined[-1].text + fragment.text, False)
        else:
            joined.append(fragment)
    return joined


def _cuts(text: str) -> list[int]:
    """Where long text is cut: every 400,000 characters, and in between within runs over 25,000."""
    if len(text) <= _RUN_CHARS:
        return []
    return [cut for start in range(0, len(text), _PIECE_CHARS) for cut in _piece_cuts(text, start)]


def _piece_cuts(text: str, start: int) -> Iterator[int]:
    """Cuts of the piece at `start`, its own beginning among them unless it is the text's."""
    if start:
        yield start
    for run in _RUN.finditer(text, start, min(start + _PIECE_CHARS, len(text))):
        yield from range(run.start() + _RUN_CHARS, run.end(), _RUN_CHARS)


def _slices(text: str, cuts: Sequence[int]) -> Iterator[str]:
    bounds = (0, *cuts, len(text))
    return (text[bounds[i] : bounds[i + 1]] for i in range(len(bounds) - 1))
