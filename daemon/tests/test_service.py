"""The daemon as a process: starting, refusing, reloading, stopping, and doing nothing while there is nothing to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from elgate.daemon.child import ChildDaemon, DaemonFailed
from elgate.daemon.service import ExitCode


def route(daemon: ChildDaemon, name: str) -> dict[str, object]:
    return {"name": name, "match": {"path": f"{daemon.route_dir}/{name}/**"}}


def test_it_serves_says_so_and_stops_on_sigterm(elgate_daemon: ChildDaemon) -> None:
    (ready,) = elgate_daemon.events("ready")
    assert ready["socket"] == str(elgate_daemon.socket)
    assert ready["routes"] == ["files"]
    assert elgate_daemon.socket.is_socket()
    assert elgate_daemon.ring_path.exists()
    assert elgate_daemon.stop() == ExitCode.OK
    assert elgate_daemon.events("stopping")[0]["signal"] == "SIGTERM"
    assert elgate_daemon.events("stopped")[0]["drained"] is True


def test_it_can_be_started_again_after_stop_and_after_kill(elgate_daemon: ChildDaemon) -> None:
    elgate_daemon.stop()
    elgate_daemon.start()
    elgate_daemon.kill()
    elgate_daemon.start()
    assert elgate_daemon.stop() == ExitCode.OK


def test_a_second_daemon_is_refused_and_the_first_goes_on(elgate_daemon: ChildDaemon) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "elgate.daemon", "--config", elgate_daemon.config_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == ExitCode.ALREADY_RUNNING, second.stderr
    assert "already_running" in second.stderr
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(elgate_daemon.socket))
    assert elgate_daemon.stop() == ExitCode.OK


def test_a_daemon_on_anothers_ring_is_refused(elgate_daemon: ChildDaemon, disk_dir: Path) -> None:
    with ChildDaemon(disk_dir / "second", sections={"ring": {"path": str(elgate_daemon.ring_path)}}) as second:
        with pytest.raises(DaemonFailed, match="ended before it served"):
            second.start()
        assert second.process is not None
        assert second.process.wait(30) == ExitCode.ALREADY_RUNNING
        (event,) = second.events("already_running")
        assert str(elgate_daemon.ring_path) in event["reason"]
    assert elgate_daemon.ring_path.exists(), "the refused one must not have removed what is not its own"


def test_a_wrong_configuration_is_refused_with_its_line(elgate_daemon_stopped: ChildDaemon) -> None:
    elgate_daemon_stopped.config_path.write_text("version: 1\nroutes:\n  - name: a\n    match: {path: relative}\n")
    with pytest.raises(DaemonFailed):
        elgate_daemon_stopped.start()
    assert elgate_daemon_stopped.process is not None
    assert elgate_daemon_stopped.process.wait(30) == ExitCode.CONFIGURATION
    (event,) = elgate_daemon_stopped.events("configuration_error")
    assert event["reason"].startswith(f"{elgate_daemon_stopped.config_path}:4: routes[0].match.path: ")


def test_a_reload_swaps_the_routes(elgate_daemon: ChildDaemon) -> None:
    elgate_daemon.write_config([route(elgate_daemon, "files"), route(elgate_daemon, "more")])
    elgate_daemon.reload()
    assert elgate_daemon.wait_for_event("reloaded")["routes"] == ["files", "more"]
    elgate_daemon.write_config([])
    elgate_daemon.reload()
    assert elgate_daemon.wait_for_event("reloaded", count=2)["routes"] == []
    assert elgate_daemon.stop() == ExitCode.OK


def test_a_wrong_reload_keeps_the_old_configuration_and_says_why(elgate_daemon: ChildDaemon) -> None:
    elgate_daemon.config_path.write_text("version: 1\nroutes:\n  - nme: a\n")
    elgate_daemon.reload()
    assert "routes[0].nme: unknown key" in elgate_daemon.wait_for_event("reload_refused")["reason"]
    elgate_daemon.write_config([route(elgate_daemon, "good")])
    elgate_daemon.reload()
    assert elgate_daemon.wait_for_event("reloaded")["routes"] == ["good"]


def test_a_reload_cannot_move_the_log(elgate_daemon: ChildDaemon) -> None:
    text = elgate_daemon.config_path.read_text()
    elgate_daemon.config_path.write_text(text.replace(str(elgate_daemon.wal_dir), f"{elgate_daemon.directory}/other"))
    elgate_daemon.reload()
    assert "wal.dir cannot change while" in elgate_daemon.wait_for_event("reload_refused")["reason"]


def test_it_tells_the_service_manager(elgate_daemon_stopped: ChildDaemon) -> None:
    address = elgate_daemon_stopped.socket.parent / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)
        elgate_daemon_stopped.start(environment={"NOTIFY_SOCKET": str(address)})
        assert manager.recv(64) == b"READY=1"
        elgate_daemon_stopped.stop()
        assert manager.recv(64) == b"STOPPING=1"


def test_its_files_are_its_users_alone(elgate_daemon: ChildDaemon) -> None:
    assert elgate_daemon.socket.stat().st_mode & 0o777 == 0o600
    assert elgate_daemon.ring_path.stat().st_mode & 0o007 == 0


def test_it_does_nothing_while_there_is_nothing_to_do(elgate_daemon: ChildDaemon) -> None:
    assert elgate_daemon.process is not None
    process = psutil.Process(elgate_daemon.process.pid)
    used_before, began = process.cpu_times(), time.monotonic()
    while time.monotonic() - began < 3:
        assert elgate_daemon.process.poll() is None
        time.sleep(0.1)
    used = process.cpu_times()
    share = (used.user + used.system - used_before.user - used_before.system) / (time.monotonic() - began)
    # The goal is 0.005, measured over a longer time by the benchmark; a tick of 10 ms more or less is 0.003 here.
    assert share < 0.02


def test_the_engine_shares_no_descriptor_with_what_started_it(elgate_daemon: ChildDaemon) -> None:
    assert elgate_daemon.process is not None
    inherited = [os.readlink(f"/proc/{elgate_daemon.process.pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert inherited == ["/dev/null", str(elgate_daemon.log_path), str(elgate_daemon.log_path)]
