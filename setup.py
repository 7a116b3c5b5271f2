"""What pyproject.toml cannot say: the native CPU kernels are compiled with the package, if they can be.

The result is a plain shared library with a C interface (no Python headers are needed), one object file per
instruction set. Where there is no C++ compiler, or the machine is no x86-64 Linux, everything else is
installed, and k2dist uses its reference kernels.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path("kernels/native")
CALLER = Path("kernels/k2kernels/native/library.py")  # has the same structures and signatures
# -ffp-contract=off: whether a product and a sum become one instruction is written out, never chosen.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISAS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": AVX512_BF16,
    "isa_amx.cpp": AMX,
}


class BuildNative(build_ext):
    """Compile with the system's C++ compiler ($CXX, g++, clang++ or c++)."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # of another build; what cannot be built must not seem to be there
        reason = _why_not()
        if reason is None:
            try:
                _compile(Path(self.build_temp), target)
                return
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(error.cmd)} failed:\n{error.stderr}"
        print(f"k2dist: no native CPU kernels were built, the slow path is in use: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if Path(self.build_lib, *self.extensions[0].name.split(".")).with_suffix(".so").exists():
            super().copy_extensions_to_source()


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


def _why_not() -> str | None:
    if (sys.platform, platform.machine()) not in (("linux", "x86_64"), ("linux", "AMD64")):
        return f"they are for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return None if _compiler() else "no C++ compiler (g++, clang++ or $CXX) was found"


def _compile(build_dir: Path, target: Path) -> None:
    compiler = _compiler()
    assert compiler is not None
    build_dir.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    isas = {name: flags for name, flags in ISAS.items() if _accepts(compiler, flags)}
    with_isas = [f"-DK2_WITH_{name[4:-4].upper()}" for name in isas]
    sources = b"".join(path.read_bytes() for path in sorted(SOURCE_DIR.iterdir()))
    names = [
        f'-DK2_SOURCES="{hashlib.sha256(sources).hexdigest()[:12]}"',
        f'-DK2_CALLER="{hashlib.sha256(CALLER.read_bytes()).hexdigest()}"',
    ]
    jobs = {"pool.cpp": [], "api.cpp": [*with_isas, *names], **isas}

    def compile_one(name: str) -> str:
        made = str(build_dir / f"{name}.o")
        _run([compiler, *FLAGS, *jobs[name], "-c", str(SOURCE_DIR / name), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    _run([compiler, "-shared", "-pthread", *objects, "-o", str(target)])


def _accepts(compiler: str, flags: list[str]) -> bool:
    """An old compiler lacks the newest instructions; the kernels for them are then left out."""
    tried = subprocess.run(
        [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull], capture_output=True, check=False
    )
    return tried.returncode == 0


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


setup(
    ext_modules=[Extension("k2kernels.native.libk2native", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
