"""Fixtures of the tests across processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def core_test_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine with its test doors open (elgate_core_test_build.zig): steps at which it kills itself, and commits
    without RWF_DSYNC. `make test` has compiled it before; from its sources as they are now, this compiles it anew."""
    folder = tmp_path_factory.mktemp("core_test_build")
    subprocess.run([sys.executable, ROOT / "hatch_build.py", "--test-build", "--output", folder], check=True)
    (library,) = folder.rglob("libelgate_core_test_build.so")
    return library
