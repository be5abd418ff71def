"""Programs behave on a route as they behave without Elgate: same results, same errors, same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCENARIOS: list[str] = _load("scenarios").SCENARIOS


def _run(directory: Path, scenarios: list[str], environment: dict[str, str]) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(HERE / "oracle_program.py"), str(directory), *scenarios],
        env={**environment, "PYTHONHASHSEED": "0"},
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _assert_same(expected: dict[str, Any], seen: dict[str, Any]) -> None:
    for number, (here, there) in enumerate(zip(expected["outcomes"], seen["outcomes"], strict=False)):
        before = str(expected["outcomes"][max(0, number - 6) : number])[-1500:]
        assert there == here, f"step {number}, after {before}"
    assert seen == expected
    assert "THE SCENARIO FAILED" not in json.dumps(expected), expected["outcomes"][-1]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_program_cannot_tell_a_route_from_a_plain_directory(scenario: str, elgate_daemon: Any) -> None:
    # Both on one file system, which has a say in errors and sizes.
    native = _run(elgate_daemon.directory / "native", [scenario], {**os.environ, "ELGATE_DISABLE": "1"})
    routed = _run(elgate_daemon.route_dir, [scenario], elgate_daemon.env())
    assert native["status"]["connected"] == 0
    assert routed["status"]["connected"] == 1
    assert routed["status"]["routed_operations"] > 0, "the scenario never reached Elgate"
    _assert_same(native["report"][scenario], routed["report"][scenario])


def test_a_program_cannot_tell_that_there_is_no_daemon(no_daemon: dict[str, str], disk_dir: Path) -> None:
    native = _run(disk_dir / "native", SCENARIOS, {**no_daemon, "ELGATE_DISABLE": "1"})
    patched = _run(disk_dir / "patched", SCENARIOS, no_daemon)
    assert patched["status"]["patched"] is True
    assert patched["status"]["connected"] == 0
    for scenario in SCENARIOS:
        _assert_same(native["report"][scenario], patched["report"][scenario])


@pytest.mark.elgate(
    routes=[{"name": "now", "match": {"path": "{route_dir}/**"}, "visibility": "immediate", "flush": "always"}]
)
@pytest.mark.parametrize("scenario", ["every_way_to_write", "append_mode", "many_threads"])
def test_nor_a_route_with_other_promises(scenario: str, elgate_daemon: Any) -> None:
    native = _run(elgate_daemon.directory / "native", [scenario], {**os.environ, "ELGATE_DISABLE": "1"})
    routed = _run(elgate_daemon.route_dir, [scenario], elgate_daemon.env())
    assert routed["status"]["routed_operations"] > 0
    _assert_same(native["report"][scenario], routed["report"][scenario])
