"""Generate `k2dist/_proto` from `protos/`: `python protos/generate.py` (extra [test]; also `make protos`).

The files are named k2dist/v1/*.proto to the world, and k2dist._proto.v1.*_pb2 to Python: protoc derives a
module from the file's name, so its import lines are rewritten.
"""

from __future__ import annotations

import re
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
PACKAGE = PROTOS.parent / "k2dist" / "_proto"
_IMPORT = re.compile(r"^from k2dist\.v1 import ", re.MULTILINE)
_INIT = {
    "__init__.py": '"""Code generated from protos/ by protos/generate.py; never edited."""\n',
    "v1/__init__.py": "",
}


def generated_files() -> dict[str, str]:
    """Path below `k2dist/_proto` -> text, of every file that belongs there."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("k2dist/v1/*.proto"))
    with tempfile.TemporaryDirectory() as out:
        scripts = Path(sysconfig.get_path("scripts"))
        flags = [
            f"--plugin=protoc-gen-{kind}={scripts / f'protoc-gen-{kind}'}" for kind in ("mypy", "mypy_grpc")
        ]
        flags += [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
        flags += [f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")]
        well_known = files("grpc_tools") / "_proto"
        status = protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *flags, *sources])
        if status != 0:
            raise SystemExit(f"protoc failed with status {status} on {', '.join(sources)}")
        root = Path(out) / "k2dist"
        texts = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py*")}
    return _INIT | {name: _IMPORT.sub("from k2dist._proto.v1 import ", text) for name, text in texts.items()}


def main() -> None:
    """Write the package, and take away what no longer belongs to it."""
    wanted = generated_files()
    for path in PACKAGE.rglob("*.py*"):
        if "__pycache__" not in path.parts and str(path.relative_to(PACKAGE)) not in wanted:
            path.unlink()
    for name, text in wanted.items():
        target = PACKAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    print(f"{PACKAGE}: {len(wanted)} files")


if __name__ == "__main__":
    main()
