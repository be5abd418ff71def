"""Compiles the native parts while the package is built, with the Zig compiler that comes from PyPI.

Hatchling calls `NativeBuildHook` for every wheel, editable ones too. By hand, without a package around it:

    python hatch_build.py                                   # into the source tree, for this machine
    python hatch_build.py --machine aarch64 --output DIR    # for another machine, elsewhere

The libraries need no symbol of a glibc newer than 2.17, whatever this machine has, and Python reaches them through
cffi's ABI mode: one wheel per machine serves every Python, hence the tag py3-none.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    """One shared library: its root source file, the package that it lies in, the header that describes it."""

    name: str
    package: Path
    header: str | None

    @property
    def file_name(self) -> str:
        return f"lib{self.name}.so"


LIBRARIES = (
    Library("elgate_client", SDK_PACKAGE, "elgate_client.h"),
    Library("elgate_core", DAEMON_PACKAGE, "elgate_core.h"),
    Library("elgate_bench", DAEMON_PACKAGE, None),
)


class BuildFailed(Exception):
    """The message is for the person who ran the build."""


def compile_library(library: Library, machine: str, output: Path) -> None:
    """Compiles one library to `output`, atomically: a program that has the old one mapped keeps it whole."""
    cache = Path(os.environ.get("ZIG_LOCAL_CACHE_DIR", ROOT / ".zig-cache"))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as scratch:
        built = Path(scratch) / output.name
        command = [
            sys.executable, "-m", "ziglang", "build-lib", "-dynamic", str(SOURCES / f"{library.name}.zig"),
            "--name", library.name, f"-femit-bin={built}", f"-fsoname={library.file_name}",
            # nodelete: a destructor of a thread must not outlive the library that it lies in.
            "-OReleaseFast", "-fllvm", "-lc", "-z", "nodelete",
            "-target", f"{machine}-linux-gnu.{GLIBC}", f"-mcpu={CPU_OF_MACHINE[machine]}",
            # A profiler or a crash report can walk the stack; the symbols of the exports are kept in any case.
            "-fstrip", "-fno-omit-frame-pointer", "-funwind-tables",
            "--cache-dir", str(cache),
            "--global-cache-dir", os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(cache / "global")),
        ]  # fmt: skip
        try:
            result = subprocess.run(command, cwd=SOURCES, text=True, capture_output=True, check=False)
        except OSError as error:
            raise BuildFailed(f"cannot run {sys.executable}: {error}") from error
        if result.returncode != 0:
            hint = ""
            if "No module named ziglang" in result.stderr:
                hint = "\nThe compiler is missing: pip install ziglang==0.15.2"
            raise BuildFailed(f"compiling {library.file_name} failed:\n{result.stderr}{hint}")
        os.replace(built, output)


def build(machine: str, destination: Path) -> None:
    """Compiles all libraries and lays each beside its header, in its package's folder under `destination`."""
    if machine not in CPU_OF_MACHINE:
        raise BuildFailed(f"elgate runs on {' and '.join(CPU_OF_MACHINE)}, not on {machine}")
    with ThreadPoolExecutor() as pool:
        for compiled in [
            pool.submit(compile_library, library, machine, destination / library.package / library.file_name)
            for library in LIBRARIES
        ]:
            compiled.result()
    for library in LIBRARIES:
        if library.header is not None:
            shutil.copyfile(HEADERS / library.header, destination / library.package / library.header)


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
    arguments = parser.parse_args()
    try:
        build(arguments.machine, arguments.output.resolve())
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
