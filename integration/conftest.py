"""Fixtures of the tests across processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU = {"x86_64": "x86_64_v2", "aarch64": "baseline+crc"}


@pytest.fixture(scope="session")
def core_test_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine with its test doors open (elgate_core_test_build.zig): steps at which it kills itself, and commits
    without RWF_DSYNC. Built once, by whichever test process comes first."""
    shared = tmp_path_factory.getbasetemp().parent
    # The directory may outlive this run: the name says what it was built from.
    sources = hashlib.sha256()
    for source in sorted((ROOT / "core").rglob("*.zig")):
        sources.update(source.read_bytes())
    library = shared / f"libelgate_core_test_build-{sources.hexdigest()[:16]}.so"
    with open(shared / "core_test_build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            machine = platform.machine()
            subprocess.run(
                [
                    sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-OReleaseSafe", "-fllvm", "-lc",
                    "-target", f"{machine}-linux-gnu.2.17", f"-mcpu={CPU[machine]}", f"-femit-bin={unfinished}",
                    str(ROOT / "core/src/elgate_core_test_build.zig"),
                ],
                check=True,
                env={
                    **os.environ,
                    "ZIG_LOCAL_CACHE_DIR": str(ROOT / ".zig-cache"),
                    "ZIG_GLOBAL_CACHE_DIR": str(ROOT / ".zig-cache/global"),
                },
            )  # fmt: skip
            unfinished.rename(library)
    return library
