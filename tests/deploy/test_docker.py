"""The Dockerfiles: clean to a linter, pinned, not root, and made of files and packages that there are."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from k2dist.cli.app import app
from k2dist.config.cluster import split_address
from tests.deploy.loading import load_script

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
instructions = load_script(DOCKER / "rehearse.py").instructions


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.stem)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def of_word(dockerfile: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == word]


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.stem for path in DOCKERFILES] == ["cpu", "cuda"]


def test_the_linter_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_something(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && pip install ray\n")
    found = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "DL3006" in found.stdout  # no tag


def test_the_base_is_pinned_and_one(dockerfile: Path) -> None:
    bases = {rest.partition(" ")[0] for rest in of_word(dockerfile, "FROM")}
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    assert {rest.partition(" ")[0] for path in DOCKERFILES for rest in of_word(path, "FROM")} == bases


def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    ignore = dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert ignore[1] == "*", "all but what is named"
    copied = {source for rest in of_word(dockerfile, "COPY") for source in rest.split()[:-1]}
    assert copied <= kept
    assert all((ROOT / source).exists() for source in kept)


def test_it_ends_as_a_user_who_is_not_root(dockerfile: Path) -> None:
    words = [word for word, _ in instructions(dockerfile)]
    assert of_word(dockerfile, "USER") == ["10001:10001"]
    last_run = max(at for at, word in enumerate(words) if word in ("RUN", "COPY"))
    assert words.index("USER") > last_run


def test_health_is_asked_where_it_is_served(dockerfile: Path) -> None:
    (health,) = of_word(dockerfile, "HEALTHCHECK")
    (command,) = of_word(dockerfile, "CMD")
    served = re.search(r'"--http", "([^"]+)"', command)
    asked = re.search(r"http://127\.0\.0\.1:(\d+)/health", health)
    assert served is not None
    assert asked is not None
    assert split_address(served.group(1)) == ("0.0.0.0", int(asked.group(1)))
    assert asked.group(1) in of_word(dockerfile, "EXPOSE")[0].split()


def test_its_command_is_one_that_k2dist_has(dockerfile: Path) -> None:
    (text,) = of_word(dockerfile, "CMD")
    program, name, *arguments = re.findall(r'"([^"]+)"', text)
    assert program == "k2dist"
    command = typer.main.get_command(app)
    with typer.Context(command) as context:
        command.commands[name].make_context(name, arguments, parent=context)


def test_the_native_library_is_asserted(dockerfile: Path) -> None:
    (builds,) = (rest for rest in of_word(dockerfile, "RUN") if "pip wheel" in rest)
    assert "grep --quiet libk2native.so" in builds


def test_every_dependency_is_pinned_to_what_it_admits() -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for requirement in map(Requirement, needed):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name}: not in deploy/docker/constraints.txt"
        assert version in requirement.specifier, f"{requirement}: pinned to {version}"
