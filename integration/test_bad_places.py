"""Rings, logs and directories that are not what they should be: a clear refusal that says what, where and what to do, or
the thing is put aside; never a crash, never something overwritten that may be somebody's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from formats import RING
from programs import Appender

from elgate.daemon.child import ChildDaemon, DaemonFailed


def refusal(daemon: ChildDaemon) -> str:
    with pytest.raises(DaemonFailed):
        daemon.start()
    assert daemon.process is not None
    assert daemon.process.wait(10) == 1
    events = daemon.events("start_failed")
    assert events, daemon.log_text()
    return events[-1]["reason"]


def test_a_ring_of_another_version(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    daemon.start()
    assert daemon.stop() == 0
    memory = bytearray(daemon.ring_path.read_bytes())
    RING["Header"].set(memory, 0, "version", 2)
    daemon.ring_path.write_bytes(memory)
    reason = refusal(daemon)
    assert str(daemon.ring_path) in reason
    assert "version 2" in reason
    assert daemon.ring_path.read_bytes() == memory


def test_a_ring_of_another_size(elgate_daemon_stopped: ChildDaemon) -> None:
    elgate_daemon_stopped.ring_path.write_bytes(b"x" * 8192)
    assert "8192 bytes" in refusal(elgate_daemon_stopped)


def test_a_ring_that_was_cut_short_while_no_daemon_was_there(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    daemon.start()
    daemon.kill()
    first_page = daemon.ring_path.read_bytes()[:4096]
    os.truncate(daemon.ring_path, 100_000)
    daemon.start()
    assert daemon.wait_for_event("ring_lost")["uid"] == os.geteuid()
    writer = Appender(daemon, daemon.route_dir / "file")
    assert writer.append("in the new one") == 0
    writer.close()
    assert daemon.stop() == 0
    aside = daemon.ring_path.with_name(daemon.ring_path.name + ".lost")
    assert aside.stat().st_size == 100_000
    assert aside.read_bytes()[:4096] == first_page


def test_a_file_that_is_no_ring(elgate_daemon_stopped: ChildDaemon) -> None:
    elgate_daemon_stopped.ring_path.write_bytes(b"x" * 4337664)
    assert "not a ring" in refusal(elgate_daemon_stopped)


def test_a_ring_that_is_a_symbolic_link(elgate_daemon_stopped: ChildDaemon, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    elgate_daemon_stopped.ring_path.symlink_to(target)
    assert "symbolic link" in refusal(elgate_daemon_stopped)
    assert target.read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_a_ring_of_another_user(elgate_daemon_stopped: ChildDaemon) -> None:
    elgate_daemon_stopped.ring_path.write_bytes(b"")
    os.chown(elgate_daemon_stopped.ring_path, 4711, -1)
    reason = refusal(elgate_daemon_stopped)
    assert "uid 4711" in reason


def test_a_ring_that_was_never_finished_is_made_anew(elgate_daemon_stopped: ChildDaemon) -> None:
    """A daemon was killed while it made the ring: nobody can have used it."""
    elgate_daemon_stopped.ring_path.write_bytes(b"")
    elgate_daemon_stopped.start()
    assert elgate_daemon_stopped.stop() == 0


def test_a_control_socket_that_is_somebodys_file(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    daemon.socket.write_text("precious")
    reason = refusal(daemon)
    assert str(daemon.socket) in reason
    assert "not a socket" in reason
    assert daemon.socket.read_text() == "precious"
    daemon.socket.unlink()
    daemon.start()
    # What has taken the socket's place meanwhile is not the daemon's to remove.
    daemon.socket.unlink()
    daemon.socket.write_text("precious")
    assert daemon.stop() == 0
    assert daemon.socket.read_text() == "precious"


def test_a_log_directory_that_is_a_file(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    daemon.wal_dir.rmdir()
    daemon.wal_dir.write_text("not a directory")
    with pytest.raises(DaemonFailed, match="wal"):
        daemon.start()


def test_a_log_directory_on_memory_is_refused_unless_allowed(elgate_daemon_stopped: ChildDaemon) -> None:
    daemon = elgate_daemon_stopped
    directory = Path("/dev/shm") / f"elgate-test-log-{os.getpid()}"
    directory.mkdir()
    try:
        text = daemon.config_path.read_text().replace(str(daemon.wal_dir), str(directory))
        daemon.config_path.write_text(text)
        with pytest.raises(DaemonFailed, match="allow_volatile"):
            daemon.start()
        daemon.config_path.write_text(text.replace("allow_volatile: false", "allow_volatile: true"))
        daemon.start()
        assert daemon.stop() == 0
    finally:
        for path in sorted(directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        directory.rmdir()


def test_foreign_files_in_a_log_stop_nothing(elgate_daemon_stopped: ChildDaemon) -> None:
    log = elgate_daemon_stopped.wal_dir / "files"
    log.mkdir()
    (log / "00000000000000000001-20260101T000000.wal").write_bytes(b"")
    (log / "00000000000000000002-20260101T000000.wal").write_bytes(os.urandom(70_000))
    (log / "notes.txt").write_text("somebody's")
    elgate_daemon_stopped.start()
    assert elgate_daemon_stopped.stop() == 0
    assert (log / "notes.txt").read_text() == "somebody's"
    kept = [path for path in log.rglob("*") if path.is_file() and path.stat().st_size == 70_000]
    assert kept, "a segment that cannot be read is put aside, not thrown away"
