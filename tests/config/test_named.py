"""Architectures by name are the published ones; a directory comes before a name."""

import json
from pathlib import Path

import msgspec
import pytest

from k2dist.config import find_architecture, read_architecture
from k2dist.config.named import architecture_names
from k2dist.errors import UsageError

PUBLISHED = Path(__file__).parent / "data" / "kimi-k2-instruct"


def test_kimi_k2_by_name_is_the_published_one() -> None:
    assert find_architecture("kimi-k2-instruct") == read_architecture(PUBLISHED)


def test_0905_differs_from_the_first_release_in_its_context() -> None:
    first, later = find_architecture("kimi-k2-instruct"), find_architecture("kimi-k2-instruct-0905")
    assert first.yarn is not None
    assert later == msgspec.structs.replace(
        first, yarn=msgspec.structs.replace(first.yarn, factor=64.0), max_positions=262_144
    )


def test_every_name_is_an_architecture() -> None:
    assert architecture_names() == ("kimi-k2-instruct", "kimi-k2-instruct-0905")
    for name in architecture_names():
        assert find_architecture(name).num_experts == 384


def test_a_directory_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kimi-k2-instruct").mkdir()
    config = json.loads((PUBLISHED / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "kimi-k2-instruct" / "config.json").write_text(json.dumps(config))
    assert find_architecture("kimi-k2-instruct").num_layers == 3


def test_what_is_neither_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match=r"--model kimi: no such directory.* kimi-k2-instruct or kimi-k2-"):
        find_architecture("kimi")
