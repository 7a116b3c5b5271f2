"""A Dockerfile's steps without an engine: each stage in a Debian tree of its own, by chroot.

    python deploy/docker/rehearse.py deploy/docker/cpu.Dockerfile DIR [--bind PATH ...] [--env NAME=VALUE ...]

For machines that have no container engine. It needs root, debootstrap and some GB in DIR. It shows that the
steps run, from the files they copy, as the user they name. It does not show that an engine accepts the file,
nor anything of the base image: Debian 12's own Python 3.11 stands in for python:3.11-slim-bookworm. `--bind`:
host paths that the steps need to reach a package index (certificates, pip's configuration, wheels). What is
only said to an engine (USER for CMD, HEALTHCHECK, ENTRYPOINT, CMD) is not run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = "bash,ca-certificates,python3,python3-pip,python3-setuptools"


@dataclass(slots=True)
class Stage:
    """A tree, and the settings that the next step inherits."""

    tree: Path
    user: str = "0:0"
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=dict)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(RUN, its text) and so on; continued lines joined, comments dropped."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    split = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word, rest.strip()) for word, _, rest in split]


def rehearse(dockerfile: Path, directory: Path, binds: list[Path], environment: dict[str, str]) -> None:
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for word, rest in instructions(dockerfile):
        print(f"--- {word} {rest[:140]}", flush=True)
        if word == "FROM":
            name = rest.partition(" AS ")[2] or str(len(stages))
            stage = stages[name] = Stage(_tree(directory, name, binds), environment=dict(environment))
            continue
        assert stage is not None, "an instruction before FROM"
        if word == "RUN":
            _run(stage, rest, stages)
        elif word == "COPY":
            _copy(stage, rest.split())
        elif word == "WORKDIR":
            stage.workdir = rest
            (stage.tree / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            stage.user = rest
        elif word in ("ENV", "ARG"):
            given = dict(re.findall(r'(\w+)="?([^"\s]*)"?', rest))
            stage.environment |= {key: stage.environment.get(key, value) for key, value in given.items()}


def _tree(directory: Path, name: str, binds: list[Path]) -> Path:
    """A new Debian tree, from one that is made once."""
    base, tree = directory / "base", directory / name
    if not base.exists():
        include = f"--include={_PACKAGES}"
        _call("debootstrap", "--variant=minbase", include, "bookworm", str(base))
        (base / "usr/bin/python").symlink_to("python3")
        (base / "usr/bin/pip").unlink(missing_ok=True)
        (base / "usr/bin/pip").symlink_to("pip3")
        next(base.glob("usr/lib/python3.*/EXTERNALLY-MANAGED")).unlink()  # the image's Python has none
    _call("cp", "--archive", str(base), str(tree))
    for path in binds:
        there = tree / str(path).lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            there.touch()
        _call("mount", "--bind", str(path), str(there))
    for path in ("/proc", "/dev", "/dev/shm"):
        _call("mount", "--bind", path, f"{tree}{path}")
    shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
    return tree


def _run(stage: Stage, text: str, stages: dict[str, Stage]) -> None:
    for option in re.findall(r"--mount=(\S+)", text):
        given = dict(part.split("=") for part in option.split(","))
        source, target = stages[given["from"]].tree, stage.tree / given["target"].lstrip("/")
        shutil.copytree(source / given["source"].lstrip("/"), target, dirs_exist_ok=True)
    command = re.sub(r"--mount=\S+", "", text).strip()
    settings = [f"{key}={value}" for key, value in stage.environment.items()]
    _call(
        *("chroot", f"--userspec={stage.user}", str(stage.tree), "env", "-i", *settings),
        "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        *("/bin/bash", "-o", "pipefail", "-c", f"cd {stage.workdir} && {command}"),
    )


def _copy(stage: Stage, words: list[str]) -> None:
    *sources, target = words
    there = stage.tree / (Path(stage.workdir) / target).as_posix().lstrip("/")
    for source in sources:
        path = ROOT / source
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(path, there, dirs_exist_ok=True, ignore=ignored)
        else:
            is_folder = target.endswith("/")
            (there if is_folder else there.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, there)


def _call(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("directory", type=Path, help="empty or absent; its mounts are left for `umount -R`")
    parser.add_argument("--bind", type=Path, action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    asked = parser.parse_args()
    environment = dict(pair.split("=", 1) for pair in asked.env)
    try:
        rehearse(asked.dockerfile, asked.directory, asked.bind, environment)
    except subprocess.CalledProcessError as error:
        print(json.dumps({"failed": error.cmd[-1], "exit_code": error.returncode}), file=sys.stderr)
        return 1
    print("every step ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
