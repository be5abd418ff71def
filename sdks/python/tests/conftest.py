"""Programs under test run in processes of their own, so that a patch never reaches pytest itself."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 90

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def no_daemon(tmp_path: Path) -> dict[str, str]:
    """The environment of a program that finds no daemon."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELGATE_")}
    return {**environment, "ELGATE_SOCKET": str(tmp_path / "no.sock")}


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Result]:
    """Runs `source` (a string), or the interpreter with `arguments`; its exit code must be `code`."""

    def run(
        source: str | None = None,
        *arguments: Any,
        env: Mapping[str, str],
        code: int = 0,
        cwd: Path = tmp_path,
        input: str | None = None,
    ) -> Result:
        command = [sys.executable]
        if source is not None:
            # In a file: tracebacks show its lines.
            program = tmp_path / "program.py"
            program.write_text(textwrap.dedent(source))
            command.append(str(program))
        result = subprocess.run(
            [*command, *map(str, arguments)],
            env=dict(env),
            cwd=cwd,
            input=input,
            text=True,
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run
