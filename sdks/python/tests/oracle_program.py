"""Runs scenarios in a directory and prints what came of each step, and what is in the files after it.

    python oracle_program.py DIRECTORY SCENARIO...

Started twice by test_oracle.py, once with ELGATE_DISABLE=1 and once on a route: both must print the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elgate

elgate.patch_all()


class Steps:
    """Records the outcome of each call: what it returned, or what it raised."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.outcomes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = function(*arguments, **options)
        except BaseException as error:
            self.outcomes.append(self._describe_error(error))
            return None
        for warning in caught:
            self.outcomes.append(["warning", warning.category.__name__, self._plain(str(warning.message))])
        self.outcomes.append(self._describe(result))
        return result

    def note(self, value: Any) -> None:
        self.outcomes.append(self._describe(value))

    def _plain(self, text: str) -> str:
        return text.replace(str(self.here), "HERE")

    def _describe_error(self, error: BaseException) -> list[Any]:
        return ["raised", type(error).__name__, getattr(error, "errno", None), self._plain(str(error))]

    def _describe(self, value: Any) -> Any:
        if isinstance(value, os.stat_result):
            return ["stat", value.st_mode, value.st_nlink, value.st_size]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return ["bytes", bytes(value).hex()]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, (tuple, list)):
            return [self._describe(item) for item in value]
        return self._plain(f"{type(value).__name__}: {value}")


def contents(here: Path) -> dict[str, str]:
    found = {}
    for path in sorted(here.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(here))] = path.read_bytes().hex()
    return found


def main() -> None:
    directory = Path(sys.argv[1])
    spec = importlib.util.spec_from_file_location("scenarios", Path(__file__).with_name("scenarios.py"))
    assert spec is not None
    assert spec.loader is not None
    scenarios = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scenarios)
    report = {}
    for name in sys.argv[2:]:
        here = directory / name
        here.mkdir(parents=True)
        os.chdir(here)
        step = Steps(here)
        before = set(os.listdir("/proc/self/fd"))
        try:
            getattr(scenarios, name)(step, here)
        except BaseException:
            step.note(f"THE SCENARIO FAILED\n{traceback.format_exc()}")
        leaked = [fd for fd in set(os.listdir("/proc/self/fd")) - before if int(fd) < 512]
        if leaked:
            step.note(f"descriptors left open: {len(leaked)}")
        report[name] = {"outcomes": step.outcomes, "contents": contents(here)}
    print(json.dumps({"report": report, "status": elgate.status()}))


if __name__ == "__main__":
    main()
