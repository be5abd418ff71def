"""The package as a user gets it: sdist, wheel, an environment with nothing else in it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "elgate/libelgate_client.so",
    "elgate/daemon/libelgate_core.so",
    "elgate/daemon/libelgate_bench.so",
}
DECLARATIONS = {"elgate/_client_declarations.py", "elgate/daemon/core_declarations.py"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.timeout(400)
def test_sdist_makes_a_wheel_that_works_in_an_empty_environment(tmp_path: Path) -> None:
    # The compiler's cache is shared with the source tree, as everything in it is found by content.
    cache = ROOT / ".zig-cache"
    caches = {"ZIG_LOCAL_CACHE_DIR": str(cache), "ZIG_GLOBAL_CACHE_DIR": str(cache / "global")}
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / "dist")]
    run(*hatchling, "-t", "sdist", cwd=ROOT)
    (sdist,) = (tmp_path / "dist").glob("elgate-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if name.endswith((".so", "_declarations.py"))]
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.glob("elgate-*") if path.is_dir())

    run(*hatchling, "-t", "wheel", cwd=source, **caches)
    (wheel,) = (tmp_path / "dist").glob("elgate-*.whl")
    assert wheel.name.endswith(f"-py3-none-manylinux_2_17_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names >= LIBRARIES | DECLARATIONS
        assert names >= {"elgate/__init__.py", "elgate/run.py", "elgate/daemon/cli.py"}
        assert not [name for name in names if not name.startswith(("elgate/", "elgate-"))]
        for library in LIBRARIES:
            needed = re.findall(rb"GLIBC_(\d+)\.(\d+)", archive.read(library))
            assert all((int(major), int(minor)) <= (2, 17) for major, minor in needed), (library, needed)
    # What was unpacked must not be what gets imported below.
    shutil.rmtree(source)

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", wheel, cwd=tmp_path)
    others = run(*pip, "freeze", "--exclude", "elgate", cwd=tmp_path).splitlines()
    assert {line.split("==")[0] for line in others} == {"cffi", "pycparser"}
    assert "connected" in run(python, "-c", "import elgate; print(elgate.status())", cwd=tmp_path)
    without_extra = subprocess.run(
        [environment / "bin" / "elgate", "version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert without_extra.returncode == 1
    assert f"{python} -m pip install '.[daemon]'" in without_extra.stderr

    run(*pip, "install", "--quiet", f"{wheel}[daemon]", cwd=tmp_path)
    assert re.match(
        r"elgate 0\.1\.0, engine 0\.1\.0 zig 0\.15\.2 ReleaseFast",
        run(environment / "bin" / "elgate", "version", cwd=tmp_path),
    )

    # For those who test their own programs: the fixture is there by itself.
    run(*pip, "install", "--quiet", f"{wheel}[test]", cwd=tmp_path)
    (tmp_path / "test_it.py").write_text("def test_it(elgate_stub):\n    assert elgate_stub.operations() == []\n")
    assert "1 passed" in run(python, "-m", "pytest", "-q", "test_it.py", cwd=tmp_path)
