"""`python -m elgate.run` runs a program as the interpreter would, from its first line to its exit code."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

SHOW = """
import sys
print(sorted((name, value) for name, value in globals().items() if name not in ("sys",)))
print(sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
def function(): pass
print(function.__module__, len(sys.stdin.read()))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    directory = tmp_path / "programs"
    directory.mkdir()
    for name, source in {
        "show": SHOW,
        "fails": "def f():\n    raise ValueError('deep')\n\ntry:\n    f()\nexcept ValueError:\n    1 / 0\n",
        "wrong": "x = = 1\n",
        "interrupted": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n",
        "exits": "import sys\nsys.exit(7)\n",
        "says": "import sys\nsys.exit('the reason')\n",
        "hooked": "import sys\nsys.excepthook = lambda *a: print(a[0], a[2].tb_frame.f_code.co_name)\n1 / 0\n",
        "at_exit": "import atexit\natexit.register(lambda: print('bye', __name__))\n",
    }.items():
        (directory / f"{name}.py").write_text(source)
    (directory / "package").mkdir()
    (directory / "package" / "__init__.py").write_text("")
    (directory / "package" / "__main__.py").write_text(SHOW)
    (directory / "directory").mkdir()
    (directory / "directory" / "__main__.py").write_text(SHOW)
    (directory / "empty").mkdir()
    (directory / "linked.py").symlink_to(directory / "directory" / "__main__.py")
    with zipfile.ZipFile(directory / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    return directory


def _both(arguments: list[str], cwd: Path, environment: dict[str, str], flags: tuple[str, ...] = ()) -> list[Any]:
    outcomes = []
    for start in ([], ["-m", "elgate.run"]):
        result = subprocess.run(
            [sys.executable, *flags, *start, *arguments],
            env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=cwd,
            # The first also is the program for `-`.
            input=SHOW if arguments[0] == "-" else "typed",
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        errors = [line for line in result.stderr.splitlines() if not line.startswith("elgate: no daemon")]
        hidden = re.compile(r"0x[0-9a-f]+")
        outcomes.append((result.returncode, hidden.sub("0x", result.stdout), hidden.sub("0x", "\n".join(errors))))
    return outcomes


@pytest.mark.parametrize(
    "arguments",
    [
        ["show.py", "a", "-m", "--b"], ["-m", "show", "a"], ["-mshow", "a"], ["-c", SHOW, "a"], ["-c" + SHOW],
        ["-", "a"], ["linked.py"], ["./show.py"], ["empty/../show.py"], ["./directory"],
        ["-m", "package", "x"], ["-m", "package.__main__"],
        ["directory", "a"], ["archive.zip", "a"], ["empty"], ["fails.py"], ["-m", "fails"], ["-c", "1/0"], ["wrong.py"],
        ["interrupted.py"], ["-m", "interrupted"], ["exits.py"], ["says.py"], ["hooked.py"], ["at_exit.py"],
        ["absent.py"], ["absent/"], ["-m", "absent"], ["-m", "package.absent"],
    ],
    ids=lambda arguments: " ".join(arguments)[:20],
)  # fmt: skip
def test_a_program_runs_as_it_would_without(arguments: list[str], programs: Path, no_daemon: dict[str, str]) -> None:
    native, hooked = _both(arguments, programs, no_daemon)
    assert hooked == native


FLAGS = ["-W error", "-O", "-s", *(["-P"] if sys.version_info >= (3, 11) else [])]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("program", ["show.py", "directory"])
def test_flags_of_the_interpreter_hold(flags: str, program: str, programs: Path, no_daemon: dict[str, str]) -> None:
    native, hooked = _both([program], programs, no_daemon, tuple(flags.split()))
    assert hooked == native


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-c"], ["-x", "show.py"]])
def test_wrong_usage_is_refused(arguments: list[str], run_python: Run, no_daemon: dict[str, str]) -> None:
    result = run_python(None, "-m", "elgate.run", *arguments, env=no_daemon, code=2)
    assert "usage: python -m elgate.run" in result.stderr


def test_the_program_is_hooked_from_its_first_line(run_python: Run, elgate_daemon: Any, tmp_path: Path) -> None:
    program = tmp_path / "ordinary.py"
    program.write_text(
        f"""
from os import write, open as open_descriptor, close, O_WRONLY, O_CREAT
with open({str(elgate_daemon.route_dir / "file")!r}, "w") as file:
    file.write("through the file")
fd = open_descriptor({str(elgate_daemon.route_dir / "fd")!r}, O_WRONLY | O_CREAT)
write(fd, b"through the descriptor")
close(fd)
import elgate
assert elgate.status()["routed_operations"] == 2, elgate.status()
"""
    )
    result = run_python(None, "-m", "elgate.run", program, env=elgate_daemon.env())
    assert result.stderr == ""
    assert (elgate_daemon.route_dir / "file").read_text() == "through the file"


def test_children_of_multiprocessing_find_the_program(run_python: Run, elgate_daemon: Any, tmp_path: Path) -> None:
    program = tmp_path / "parallel.py"
    program.write_text(
        f"""
import multiprocessing, os, sys

def work(number):
    with open(os.path.join({str(elgate_daemon.route_dir)!r}, str(number)), "w") as file:
        file.write("work" * number)
    return number

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(work, range(1, 5)) == [1, 2, 3, 4]
            pool.map(os.unlink, [os.path.join({str(elgate_daemon.route_dir)!r}, str(number)) for number in (1, 2)])
    print(open(os.path.join({str(elgate_daemon.route_dir)!r}, "3")).read())
"""
    )
    result = run_python(None, "-m", "elgate.run", program, env=elgate_daemon.env())
    assert result.stdout == "workworkwork\n"
