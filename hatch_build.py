"""Compiles the native parts while the package is built, with the Zig compiler that comes from PyPI.

Hatchling calls `NativeBuildHook` for every wheel, editable ones too. By hand, without a package around it:

    python hatch_build.py                                   # into the source tree, for this machine
    python hatch_build.py --machine aarch64 --output DIR    # for another machine, elsewhere
    python hatch_build.py --test-build --output DIR         # instead, the engine with its test doors open

The libraries need no symbol of a glibc newer than 2.17, whatever this machine has, and Python reaches them through
cffi's ABI mode: one wheel per machine serves every Python, hence the tag py3-none.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "core" / "src"
HEADERS = ROOT / "core" / "include"
SDK_PACKAGE = Path("sdks/python/elgate")
DAEMON_PACKAGE = Path("daemon/elgate/daemon")

GLIBC = "2.17"

# CRC32C in hardware is part of both: SSE 4.2 belongs to x86-64-v2 (every server since 2009), and the CRC
# extension, optional in ARMv8.0, has been in every aarch64 server so far.
CPU_OF_MACHINE = {"x86_64": "x86_64_v2", "aarch64": "baseline+crc"}


class Library(NamedTuple):
    """One shared library: its root source file, the package that it lies in, the header that describes it, and the
    Python module that is made from that."""

    name: str
    package: Path
    header: str | None = None
    declarations: str | None = None
    mode: str = "ReleaseFast"

    @property
    def file_name(self) -> str:
        return f"lib{self.name}.so"


LIBRARIES = (
    Library("elgate_client", SDK_PACKAGE, "elgate_client.h", "_client_declarations"),
    Library("elgate_core", DAEMON_PACKAGE, "elgate_core.h", "core_declarations"),
    Library("elgate_bench", DAEMON_PACKAGE),
)
# The engine with its test doors open: for tests, so with all of Zig's checks, and compiled in a fifth of the time.
TEST_BUILD = Library("elgate_core_test_build", DAEMON_PACKAGE, mode="Debug")


class BuildFailed(Exception):
    """The message is for the person who ran the build."""


def compile_library(library: Library, machine: str, output: Path) -> None:
    """Compiles one library to `output`, atomically: a program that has the old one mapped keeps it whole.

    The compiler caches no library that it writes to a given place, so the last one is kept here, under a name that
    says what it was compiled from: a build of the same sources, wherever they lie, is a copy."""
    cache = Path(os.environ.get("ZIG_LOCAL_CACHE_DIR", ROOT / ".zig-cache"))
    command = [
        sys.executable, "-m", "ziglang", "build-lib", "-dynamic", f"{library.name}.zig",
        "--name", library.name, f"-fsoname={library.file_name}",
        # nodelete: a destructor of a thread must not outlive the library that it lies in.
        f"-O{library.mode}", "-fllvm", "-lc", "-z", "nodelete",
        "-target", f"{machine}-linux-gnu.{GLIBC}", f"-mcpu={CPU_OF_MACHINE[machine]}",
        # A profiler or a crash report can walk the stack; the symbols of the exports are kept in any case.
        "-fstrip", "-fno-omit-frame-pointer", "-funwind-tables",
    ]  # fmt: skip
    digest = digest_of_inputs(command)
    kept = cache / "libraries" / machine / f"{library.name}-{digest}.so"
    places = [
        "--cache-dir", str(cache),
        "--global-cache-dir", os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(cache / "global")),
    ]  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as scratch:
        built = Path(scratch) / output.name
        try:
            shutil.copyfile(kept, built)
        except FileNotFoundError:
            compile_to(built, [*command, *places])
            if digest_of_inputs(command) == digest:  # nobody edited meanwhile
                keep(built, kept, f"{library.name}-*.so")
        os.replace(built, output)


def digest_of_inputs(command: list[str]) -> str:
    """Of all that a library is made from: the sources, the compiler, and what it is told."""
    try:
        compiler = metadata.version("ziglang")
    except metadata.PackageNotFoundError as error:
        raise BuildFailed("the compiler is missing: pip install ziglang==0.15.2") from error
    digest = hashlib.sha256(repr((compiler, command[1:])).encode())
    for source in sorted(path for path in (ROOT / "core").rglob("*") if path.suffix in (".zig", ".h")):
        content = source.read_bytes()
        digest.update(f"{source.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def compile_to(built: Path, command: list[str]) -> None:
    try:
        result = subprocess.run(
            [*command, f"-femit-bin={built}"], cwd=SOURCES, text=True, capture_output=True, check=False
        )
    except OSError as error:
        raise BuildFailed(f"cannot run {sys.executable}: {error}") from error
    if result.returncode != 0:
        raise BuildFailed(f"compiling {built.name} failed:\n{result.stderr}")


def keep(built: Path, kept: Path, predecessors: str) -> None:
    """Lays a copy of `built` in the cache, in the place of its predecessors."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=kept.parent) as scratch:
        copy = Path(scratch) / kept.name
        shutil.copyfile(built, copy)
        for predecessor in kept.parent.glob(predecessors):
            predecessor.unlink(missing_ok=True)
        os.replace(copy, kept)


def build(machine: str, destination: Path, libraries: Sequence[Library] = LIBRARIES) -> None:
    """Compiles `libraries` and lays each beside what its header declares, in its package's folder under
    `destination`."""
    if machine not in CPU_OF_MACHINE:
        raise BuildFailed(f"elgate runs on {' and '.join(CPU_OF_MACHINE)}, not on {machine}")
    with ThreadPoolExecutor() as pool:
        for compiled in [
            pool.submit(compile_library, library, machine, destination / library.package / library.file_name)
            for library in libraries
        ]:
            compiled.result()
    for library in libraries:
        if library.header is not None and library.declarations is not None:
            declare(HEADERS / library.header, destination / library.package / f"{library.declarations}.py")


def declare(header: Path, module: Path) -> None:
    """Makes the module whose `ffi` knows what the header says. Nothing is parsed any more where it is imported."""
    try:
        from cffi import FFI
    except ModuleNotFoundError as error:
        raise BuildFailed("what reads the headers is missing: pip install cffi") from error
    ffi = FFI()
    ffi.cdef(readable(header.read_text()))
    ffi.set_source(f"elgate.{module.stem}", None)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=module.parent) as scratch:
        made = Path(scratch) / module.name
        with contextlib.redirect_stdout(None):
            ffi.emit_python_code(str(made))
        os.replace(made, module)


def readable(header: str) -> str:
    """A header as cffi reads it: without comments, guards and includes. Numeric constants stay."""
    kept = [line for line in header.splitlines() if not line.startswith("#") or re.match(r"#define\s+\w+\s+-?\d", line)]
    included = "struct iovec { void *iov_base; size_t iov_len; };" if "<sys/uio.h>" in header else ""
    return included + re.sub(r"/\*.*?\*/", "", "\n".join(kept), flags=re.DOTALL)


def refuse_other_systems() -> None:
    """Raises where the libraries could not be loaded: better now than at the first import."""
    if sys.platform != "linux":
        raise BuildFailed(f"elgate needs Linux (shared memory, futexes, io_uring); this is {sys.platform}")
    if platform.libc_ver()[0] != "glibc":
        raise BuildFailed("elgate needs a Python that runs on glibc; musl (Alpine) is not supported")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile Elgate's native libraries.")
    parser.add_argument("--machine", choices=sorted(CPU_OF_MACHINE), default=platform.machine())
    parser.add_argument("--output", type=Path, default=ROOT, help="folder to lay the packages' folders in")
    parser.add_argument("--test-build", action="store_true", help="the engine with its test doors open, and it alone")
    arguments = parser.parse_args()
    try:
        libraries = [TEST_BUILD] if arguments.test_build else LIBRARIES
        build(arguments.machine, arguments.output.resolve(), libraries)
    except BuildFailed as error:
        print(f"hatch_build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
else:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class NativeBuildHook(BuildHookInterface):
        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict) -> None:
            machine = platform.machine()
            try:
                refuse_other_systems()
                build(machine, Path(self.root))
            except BuildFailed as error:
                self.app.abort(str(error))
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-manylinux_{GLIBC.replace('.', '_')}_{machine}"
