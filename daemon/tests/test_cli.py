"""The command line: what each command prints for people and for programs, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from elgate.daemon.child import ChildDaemon
from elgate.daemon.commands import hooked_command


def elgate(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; from elgate.daemon.cli import main; sys.exit(main())", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(environment) if environment is not None else None,
    )


@pytest.fixture
def good_file(disk_dir: Path) -> Path:
    path = disk_dir / "good.yaml"
    path.write_text(
        f"version: 1\nwal: {{dir: {disk_dir}/wal, allow_volatile: true}}\n"
        f"routes:\n  - {{name: a, match: {{path: {disk_dir}/**}}}}\n"
    )
    return path


@pytest.fixture
def bad_file(disk_dir: Path) -> Path:
    path = disk_dir / "bad.yaml"
    path.write_text("version: 1\nruntime: {shards: 9}\nroutes: 7\n")
    return path


def test_without_a_command_it_shows_help() -> None:
    result = elgate("--help")
    assert result.returncode == 0
    for command in ("daemon", "run", "status", "config", "bench", "demo", "doctor", "version"):
        assert f"\n  {command} " in result.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    result = elgate("demon")
    assert result.returncode == 2
    assert "demon" in result.stderr


def test_config_check(good_file: Path, bad_file: Path) -> None:
    good = elgate("config", "check", good_file)
    assert (good.returncode, good.stdout) == (0, f"{good_file}: ok, 1 route\n")
    bad = elgate("config", "check", bad_file)
    assert bad.returncode == 2
    assert [line.split(": ")[:2] for line in bad.stderr.splitlines()] == [
        [f"{bad_file}:2", "runtime.shards"],
        [f"{bad_file}:3", "routes"],
    ]


def test_config_check_as_json(good_file: Path, bad_file: Path) -> None:
    good = elgate("config", "check", good_file, "--json")
    assert json.loads(good.stdout) == {"file": str(good_file), "ok": True, "problems": []}
    bad = elgate("config", "check", bad_file, "--json")
    assert bad.returncode == 2
    document = json.loads(bad.stdout)
    assert document["ok"] is False
    assert [(problem["line"], problem["field"]) for problem in document["problems"]] == [
        (2, "runtime.shards"),
        (3, "routes"),
    ]


def test_config_show_gives_the_same_as_yaml_and_as_json(good_file: Path, disk_dir: Path) -> None:
    as_yaml = yaml.safe_load(elgate("config", "show", "--config", good_file).stdout)
    as_json = json.loads(elgate("config", "show", "--config", good_file, "--json").stdout)
    assert as_yaml == as_json
    assert as_json["wal"]["segment_size"] == "64MiB"
    assert as_json["routes"][0]["match"]["path"] == f"{os.path.realpath(disk_dir)}/**"


def test_version() -> None:
    document = json.loads(elgate("version", "--json").stdout)
    assert document["elgate"] == "0.1.0"
    assert document["engine"].startswith("0.1.0 zig 0.15.2 ")
    assert document["engine"] in elgate("version").stdout


def test_status_finds_a_daemon(elgate_daemon: ChildDaemon) -> None:
    found = elgate("status", "--json", environment=elgate_daemon.env())
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["connected"] is True
    elgate_daemon.stop()
    gone = elgate("status", "--json", environment=elgate_daemon.env())
    assert gone.returncode == 1
    assert json.loads(gone.stdout)["connected"] is False
    for_people = elgate("status", environment=elgate_daemon.env())
    assert (for_people.returncode, for_people.stdout.split(":")[0]) == (1, "no daemon serves this user")


def test_run_refuses_what_it_cannot_hook() -> None:
    result = elgate("run", "--", "ls", "-l")
    assert result.returncode == 1
    assert "'ls' is not a Python program" in result.stderr


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """An interpreter without elgate, by the names `python3` and `python`."""
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python"):
        # Its own libraries, and nothing that is installed here.
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path / "bin" / "python3"


def test_run_says_so_where_the_interpreter_has_no_elgate(other_python: Path) -> None:
    result = elgate("run", "--", str(other_python), "-c", "print('ran')")
    assert result.returncode == 1
    assert f"'{other_python}' has no package elgate" in result.stderr
    assert f"{other_python} -m pip install" in result.stderr
    assert sys.executable in result.stderr
    missing = elgate("run", "--", "/nowhere/python3", "a.py")
    assert "cannot run '/nowhere/python3': No such file" in missing.stderr


@pytest.mark.parametrize("name", ["python", "python3"])
def test_run_takes_its_own_interpreter_for_a_bare_python_without_elgate(
    name: str, other_python: Path, elgate_daemon: ChildDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside a clone: to Python a directory of that name looks like a package.
    (other_python.parent / "elgate").mkdir()
    monkeypatch.chdir(other_python.parent)
    path = f"{other_python.parent}:{os.environ['PATH']}"
    program = "import sys, elgate; print(sys.executable, elgate.status()['patched'])"
    result = elgate("run", "--", name, "-c", program, environment={**elgate_daemon.env(), "PATH": path})
    assert result.stdout.split() == [sys.executable, "True"], result.stderr
    assert f"{other_python.parent / name} has no elgate; {sys.executable} runs the program" in result.stderr


def test_run_routes_an_ordinary_programs_files(elgate_daemon: ChildDaemon) -> None:
    target = elgate_daemon.route_dir / "out.txt"
    program = elgate_daemon.directory / "program.py"
    program.write_text("import sys\nwith open(sys.argv[1], 'w') as file:\n    file.write('hello')\n")
    result = elgate("run", "--", sys.executable, "-u", program, target, environment=elgate_daemon.env())
    assert result.returncode == 0, result.stderr
    assert target.read_text() == "hello"
    elgate_daemon.stop()
    assert elgate_daemon.events("stopped")[0]["counters"].get("records_total", 0) >= 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "a.py", "-x"], ["python", "-m", "elgate.run", "a.py", "-x"]),
        (["/usr/bin/python3.11", "-u", "a.py"], ["/usr/bin/python3.11", "-u", "-m", "elgate.run", "a.py"]),
        (["python3", "-X", "dev", "-m", "mod"], ["python3", "-X", "dev", "-m", "elgate.run", "-m", "mod"]),
        (["python3", "-W", "error", "-c", "1"], ["python3", "-W", "error", "-m", "elgate.run", "-c", "1"]),
        (["python3", "-mmod", "-x"], ["python3", "-m", "elgate.run", "-mmod", "-x"]),
        (["python3", "-"], ["python3", "-m", "elgate.run", "-"]),
        (["./a.py", "b"], [sys.executable, "-m", "elgate.run", "./a.py", "b"]),
        (["ls"], None),
        (["pythonic"], None),
    ],
)
def test_run_puts_the_hook_behind_the_interpreters_own_options(command: list[str], expected: list[str] | None) -> None:
    assert hooked_command(tuple(command)) == expected
