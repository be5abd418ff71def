"""Files that have been closed: soon nothing in the log is for them any more, and what others do with them stays,
whatever happens to the daemon."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from load import seed_of_this_run
from programs import Program, wait_until

from elgate.daemon.child import ChildDaemon

pytestmark = pytest.mark.elgate(wal={"checkpoint_interval": "10min"})


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def is_marked(path: Path) -> bool:
    return "user.elgate" in os.listxattr(path)


def wait_for_release(path: Path) -> None:
    closed = time.monotonic()
    wait_until(lambda: not is_marked(path), f"the mark is taken off {path}")
    print(f"released {(time.monotonic() - closed) * 1000:.0f} ms after its close")


def append(program: Program, path: Path, text: bytes) -> None:
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)")
    program.do(f"os.write(fd, {text!r})")
    program.do("os.close(fd)")


def counters(daemon: ChildDaemon) -> dict[str, int]:
    assert daemon.stop() == 0, daemon.log_text()[-4000:]
    found: dict[str, int] = daemon.events("stopped")[-1]["counters"]
    return found


def route(flush: Any) -> list[dict[str, Any]]:
    return [{"name": "files", "match": {"path": "{route_dir}/**"}, "flush": flush}]


FLUSH_MODES = [
    pytest.param(flush, marks=pytest.mark.elgate(wal={"checkpoint_interval": "10min"}, routes=route(flush)), id=name)
    for name, flush in {"always": "always", "group": "group", "interval": {"interval": "60s"}, "none": "none"}.items()
]


@pytest.mark.parametrize("flush", FLUSH_MODES)
def test_what_others_do_with_a_closed_file_is_not_undone(
    flush: Any, elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    names = ("appended", "cut", "replaced", "copied and cut", "removed", "moved")
    paths = {name: daemon.route_dir / name for name in names}
    for path in paths.values():
        append(program, path, b"ours\n")
        wait_for_release(path)
    with open(paths["appended"], "ab") as file:
        file.write(b"theirs\n")
    os.truncate(paths["cut"], 2)
    (daemon.route_dir / "new").write_bytes(b"theirs\n")
    (daemon.route_dir / "new").rename(paths["replaced"])
    subprocess.run(["cp", paths["copied and cut"], daemon.route_dir / "copy"], check=True)
    os.truncate(paths["copied and cut"], 0)
    paths["removed"].unlink()
    paths["moved"].rename(daemon.directory / "moved")
    daemon.kill()
    daemon.start()
    program.do("1")
    assert paths["appended"].read_bytes() == b"ours\ntheirs\n"
    assert paths["cut"].read_bytes() == b"ou"
    assert paths["replaced"].read_bytes() == b"theirs\n"
    assert (paths["copied and cut"].read_bytes(), (daemon.route_dir / "copy").read_bytes()) == (b"", b"ours\n")
    assert not paths["removed"].exists()
    assert (daemon.directory / "moved").read_bytes() == b"ours\n"
    assert not daemon.events("records_quarantined")
    assert not daemon.events("log_replayed")  # there is nothing to replay


def test_who_opens_a_closed_file_again_has_it_as_it_was(elgate_daemon: ChildDaemon, stack: ExitStack) -> None:
    """Open, write and close in a loop: the file is let go of once, behind it."""
    daemon = elgate_daemon
    path = daemon.route_dir / "looped"
    program = stack.enter_context(Program(daemon))
    program.do(f"open_it = lambda: os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)")
    program.do("put = lambda fd, number: (os.write(fd, b'%04d\\n' % number), os.close(fd))")
    program.do("for number in range(500): put(open_it(), number)")
    wait_for_release(path)
    assert path.read_bytes() == b"".join(b"%04d\n" % number for number in range(500))
    counted = counters(daemon)
    assert counted["files_registered_total"] == 500
    # A machine that is slow enough lets a moment pass now and then.
    assert 1 <= counted["files_released_total"] < 250


SHORT_LIVED = """
import os, sys
import elgate
assert elgate.patch_all()
directory, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(count):
    path = f"{directory}/{name}-{number}"
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, b"%d " % number * 100)
    os.fsync(fd)
    os.close(fd)
    os.rename(path + ".new", path)
    print(number, flush=True)
print(elgate.status()["native_fallbacks"], flush=True)
sys.stdin.readline()
"""


# What a replay has found waits for its clients, for as long as a checkpoint does.
@pytest.mark.elgate(wal={"checkpoint_interval": "500ms"})
@pytest.mark.parametrize("kills", [0, 3])
def test_thousands_of_short_lived_files_take_few_descriptors(
    kills: int, elgate_daemon_stopped: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon_stopped
    count = 1000
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def start() -> None:
        # The daemon takes as many as it may have.
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0], limit[1]))
        daemon.start()
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (128, limit[1]))

    start()
    programs = []
    for name in "ab":
        process = subprocess.Popen(
            [sys.executable, "-c", SHORT_LIVED, str(daemon.route_dir), name, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        programs.append(process)
    most = 0
    for number in range(count):
        for process in programs:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{number}\n"
        if kills and number % (count // (kills + 1)) == count // (kills + 1) - 1 and number < count - 10:
            daemon.kill()
            start()
        if number % 50 == 49:
            most = max(most, len(os.listdir(f"/proc/{daemon.pid}/fd")))
    print(f"at most {most} descriptors")
    for process in programs:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "0\n"  # nothing went native
        process.stdin.close()
        assert process.wait(20) == 0
    daemon.kill()
    daemon.start()
    names = sorted(path.name for path in daemon.route_dir.iterdir())
    assert names == sorted(f"{name}-{number}" for name in "ab" for number in range(count))
    for path in daemon.route_dir.iterdir():
        assert path.read_bytes() == b"%d " % int(path.name[2:]) * 100
    counted = counters(daemon)
    assert not daemon.events("records_quarantined")
    assert counted.get("files_open", 0) == 0
    assert not any(is_marked(path) for path in daemon.route_dir.iterdir())


def test_a_daemon_that_is_short_of_descriptors_says_so_and_goes_on(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    program.do("1")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    program.do(f"fds = [os.open({str(daemon.route_dir)!r} + f'/{{n}}', os.O_WRONLY | os.O_CREAT) for n in range(60)]")
    program.do("[os.write(fd, b'content') for fd in fds]")
    refused = daemon.wait_for_event("file_stays_native")
    assert refused["reason"] == "limit_reached" and "RLIMIT_NOFILE" in refused["hint"]
    program.do("[os.close(fd) for fd in fds]")
    assert all((daemon.route_dir / str(number)).read_bytes() == b"content" for number in range(60))
    # With what was closed, there is room for others again.
    wait_until(lambda: not any(is_marked(path) for path in daemon.route_dir.iterdir()), "all are let go of")
    program.do("before = elgate.status()['native_fallbacks']; assert before > 0")
    for number in range(40):
        append(program, daemon.route_dir / f"later-{number}", b"content")
    program.do("assert elgate.status()['native_fallbacks'] == before")


def test_who_opens_a_file_waits_for_the_descriptors_of_closed_ones(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    append(program, daemon.route_dir / "first", b"content")
    wait_for_release(daemon.route_dir / "first")
    # Room for ten files with two each, and for what is on its way; not for twenty.
    used = max(int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd"))
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + 28, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    program.do(f"at = {str(daemon.route_dir)!r}")
    program.do("opened = lambda name: [os.open(f'{at}/{name}{n}', os.O_WRONLY | os.O_CREAT) for n in range(10)]")
    program.do("written = lambda fds: [os.write(fd, b'content') for fd in fds]")
    program.do("a = opened('a'); b = opened('b'); written(a); [os.close(fd) for fd in a]; written(b)")
    program.do("assert elgate.status()['native_fallbacks'] == 0")
    assert daemon.events("descriptors_exhausted") and not daemon.events("file_stays_native")
    program.do("[os.close(fd) for fd in b]")
    assert all((daemon.route_dir / f"{name}{n}").read_bytes() == b"content" for name in "ab" for n in range(10))


def test_a_start_that_needs_more_descriptors_than_it_has_says_so_and_loses_nothing(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    program.do(f"fds = [os.open({str(daemon.route_dir)!r} + f'/{{n}}', os.O_WRONLY | os.O_CREAT) for n in range(60)]")
    program.do("[os.write(fd, b'content') for fd in fds]")
    program.do("os.fsync(fds[-1])")
    daemon.kill()
    for number in range(60):
        os.truncate(daemon.route_dir / str(number), 0)
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    limited = limit + "; os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-m", "elgate.daemon", "--config", str(daemon.config_path)]
    failed = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "RLIMIT_NOFILE" in failed.stdout + failed.stderr, (failed.stdout, failed.stderr)
    daemon.start()
    assert all((daemon.route_dir / str(number)).read_bytes() == b"content" for number in range(60))
    assert not daemon.events("records_quarantined")


@pytest.mark.parametrize("step", ["file_synced", "file_released"])
def test_a_daemon_killed_at_each_step_of_a_release(
    step: str, elgate_daemon_stopped: ChildDaemon, core_test_build: Path, stack: ExitStack
) -> None:
    daemon = elgate_daemon_stopped
    with_doors = {"ELGATE_CORE_LIBRARY": str(core_test_build)}
    daemon.start(environment={**with_doors, "ELGATE_KILL_AT": f"{step}:3"})
    program = stack.enter_context(Program(daemon))
    path = daemon.route_dir / "file"
    for number in range(4):
        append(program, path, b"%d\n" % number)
        if number < 3:
            wait_for_release(path)
    assert daemon.process is not None
    code = daemon.process.wait(60)
    assert code == -signal.SIGKILL, f"step {step} was not hit: exit code {code}\n{daemon.log_text()[-4000:]}"
    assert is_marked(path)
    if step == "file_released":
        os.truncate(path, 1)  # from then on it is others'
    daemon.start(environment=with_doors)
    if step == "file_released":
        assert not is_marked(path)
        assert path.read_bytes() == b"0"
    else:
        assert path.read_bytes() == b"0\n1\n2\n3\n"
    append(program, path, b"more\n")
    daemon.kill()
    daemon.start(environment=with_doors)
    assert path.read_bytes() == (b"0more\n" if step == "file_released" else b"0\n1\n2\n3\nmore\n")
    assert not daemon.events("records_quarantined")


def test_a_file_that_a_replay_has_found_is_let_go_of_when_nobody_opens_it(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    path = daemon.route_dir / "file"
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'one'); os.fsync(fd)")
    program.close()
    daemon.kill()
    assert is_marked(path)
    daemon.start()
    wait_until(lambda: not is_marked(path), "the mark is taken off")
    os.truncate(path, 1)
    daemon.kill()
    daemon.start()
    assert path.read_bytes() == b"o"
    assert not daemon.events("records_quarantined")


def test_a_file_that_is_opened_again_behind_a_replay_is_kept(elgate_daemon: ChildDaemon, stack: ExitStack) -> None:
    daemon = elgate_daemon
    program = stack.enter_context(Program(daemon))
    path = daemon.route_dir / "file"
    program.do(f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT)")
    program.do("os.write(fd, b'one'); os.fsync(fd)")
    daemon.kill()
    daemon.start()
    program.do("os.write(fd, b'two'); os.fsync(fd)")
    # Longer than such a file is kept for its programs.
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert is_marked(path)
        program.do("os.pwrite(fd, b'two', 3)")
    daemon.kill()
    os.truncate(path, 1)
    daemon.start()
    assert path.read_bytes() in (b"onetwo", b"o\0\0two")
    program.do("os.close(fd)")
    wait_for_release(path)


OPENER = """
import os, random, sys, time
import elgate
assert elgate.patch_all()
directory, name, choices = sys.argv[1], sys.argv[2], random.Random(int(sys.argv[3]))
number = 0
while True:
    path = f"{directory}/{choices.randrange(4)}"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for _ in range(choices.randrange(1, 3)):
        os.write(fd, f"{name} {number}\\n".encode())
        number += 1
    os.close(fd)
    print(path, number, flush=True)
    # About as long as a moment after which a closed file is let go of.
    if choices.random() < 0.5:
        time.sleep(choices.random() * 0.05)
"""


def test_files_that_are_opened_and_closed_while_the_daemon_dies_again_and_again(
    elgate_daemon: ChildDaemon, stack: ExitStack
) -> None:
    """Two programs, four files, and every step of letting go of one with a kill in it. Each line stands there once, and
    a program's lines in order."""
    daemon = elgate_daemon
    seed = seed_of_this_run()
    choices = random.Random(seed)
    programs = []
    for name in "ab":
        process = subprocess.Popen(
            [sys.executable, "-c", OPENER, str(daemon.route_dir), name, str(choices.randrange(1 << 30))],
            stdout=subprocess.PIPE, text=True, env={**daemon.env(), "ELGATE_FALLBACK": "wait"},
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        programs.append(process)
    closed = {}
    for _ in range(30):
        for _ in range(choices.randrange(2, 20)):
            for name, process in zip("ab", programs, strict=True):
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, f"program {name} ended by itself\n{daemon.log_text()[-3000:]}"
                closed[name] = int(line.split()[1])
        daemon.kill()
        daemon.start()
    for process in programs:
        process.kill()
        process.wait()
    counted = counters(daemon)
    found: dict[str, list[int]] = {"a": [], "b": []}
    for path in daemon.route_dir.iterdir():
        lines = [line.split() for line in path.read_text().splitlines()]
        for name, numbers in found.items():
            own = [int(number) for who, number in lines if who == name]
            assert own == sorted(own)
            numbers += own
    for name, numbers in found.items():
        assert len(numbers) == len(set(numbers)), "lines that stand there twice"
        missing = set(range(closed[name])) - set(numbers)
        assert not missing, f"{len(missing)} of {closed[name]} lines of {name} are missing: {sorted(missing)[:5]}"
    assert not daemon.events("records_quarantined")
    assert not daemon.events("file_stays_native")
    assert counted.get("slots_damaged_total", 0) == 0
    # Which ones keep their mark over a stop now and then, and why, is not known yet: a start lets go of them.
    assert daemon.events("stopped")
