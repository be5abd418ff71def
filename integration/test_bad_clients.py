"""What no client should send: the daemon says so, counts it, goes on, and loses nothing of anybody else."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from formats import CONTROL, ENUMERATIONS, RING
from load import seed_of_this_run
from rawclient import CONTROL_MAGIC, HEADER, KINDS, RawClient

from elgate.daemon.child import ChildDaemon

LIMIT_S = 20.0

HONEST_PROGRAM = """
import os, sys
import elgate
assert elgate.patch_all()
with open(sys.argv[1], "a") as journal:
    for number in range(200):
        journal.write(f"line {number}\\n")
        journal.flush()
        os.fsync(journal.fileno())
"""


def wait_until(condition: Callable[[], bool], what: str, daemon: ChildDaemon) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {LIMIT_S:g} s\n{daemon.log_text()[-3000:]}"
        time.sleep(0.005)


def others_go_on(daemon: ChildDaemon) -> None:
    """An honest program that starts now finds everything in order."""
    path = daemon.route_dir / "honest.log"
    subprocess.run([sys.executable, "-c", HONEST_PROGRAM, str(path)], check=True, env=daemon.env(), timeout=60)
    assert path.read_text() == "".join(f"line {number}\n" for number in range(200))
    assert daemon.process is not None
    assert daemon.process.poll() is None


@pytest.fixture
def raw(elgate_daemon: ChildDaemon) -> RawClient:
    client = RawClient(elgate_daemon.socket)
    client.hello()
    client.attach()
    client.register(elgate_daemon.route_dir / "raw.log")
    return client


FALSE_SLOTS = {
    "length": {"length_bytes": 2000},
    "length_beyond_the_limit": {"length_bytes": 0xFFFFFFFF},
    "span": {"span": 5},
    "handle": {"handle": 4711},
    "handle_out_of_range": {"handle": 0xFFFFFFFF},
    "file": {"file_id": 1},
    "payload_checksum": {"payload_checksum": 1},
    "header_checksum": {"header_checksum": 1},
    "position": {"position": 123456},
    "operation": {"operation": 99},
}


@pytest.mark.parametrize("false", FALSE_SLOTS)
def test_a_slot_with_something_false_is_refused_and_its_neighbours_are_kept(
    false: str, raw: RawClient, elgate_daemon: ChildDaemon
) -> None:
    raw.put(b"before\n")
    raw.put(b"the false one\n", **FALSE_SLOTS[false])  # type: ignore[arg-type]
    last = raw.put(b"behind\n")
    wait_until(lambda: raw.tail() > last and raw.applied() > last, "all is released and applied", elgate_daemon)
    event = elgate_daemon.wait_for_event("slot_damaged")
    assert event["reason"]
    assert event["level"] == "error"
    # Its sender learns of it: to it, the operation would look done.
    assert raw.error()[0] > 0
    assert (elgate_daemon.route_dir / "raw.log").read_bytes() == b"before\nbehind\n"
    raw.close()
    others_go_on(elgate_daemon)


def test_a_claim_that_is_never_committed_holds_nobody_up(raw: RawClient, elgate_daemon: ChildDaemon) -> None:
    raw.put(b"never\n", commit=False)
    last = raw.put(b"behind it\n")
    wait_until(lambda: raw.applied() > last, "what stands behind is applied", elgate_daemon)
    others_go_on(elgate_daemon)
    raw.close()


def test_a_head_that_points_anywhere_is_set_right(raw: RawClient, elgate_daemon: ChildDaemon) -> None:
    last = raw.put(b"one\n")
    wait_until(lambda: raw.applied() > last, "applied", elgate_daemon)
    RING["Header"].set(raw.ring, 0, "head", 1 << 60)
    raw.ring_doorbell()
    wait_until(lambda: raw.head == last + 1, "the head is right again", elgate_daemon)
    raw.close()
    others_go_on(elgate_daemon)


def test_scribbling_all_over_the_ring_leaves_the_daemon_alive(raw: RawClient, elgate_daemon: ChildDaemon) -> None:
    choices = random.Random(seed_of_this_run())
    for _ in range(300):
        raw_words = choices.randrange(4096, 12288)
        raw.ring[raw_words] = choices.randrange(256)
        slot = choices.randrange(143360, len(raw.ring))
        raw.ring[slot] = choices.randrange(256)
        raw.ring[choices.randrange(128, 520)] = choices.randrange(256)
        if choices.random() < 0.1:
            raw.ring_doorbell()
    raw.close()
    assert elgate_daemon.process is not None
    # Whoever scribbles may spoil the ring for its own user, but the daemon lives and stops in order.
    with RawClient(elgate_daemon.socket) as second:
        second.hello()
    assert elgate_daemon.process.poll() is None


def test_positions_cannot_be_written_by_a_client(raw: RawClient) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(raw.positions_fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(raw.positions_fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(raw.positions_fd, 0)
    raw.close()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 40, CONTROL["Hello"].size - 1])
def test_a_message_cut_short_is_refused(length: int, elgate_daemon: ChildDaemon) -> None:
    with RawClient(elgate_daemon.socket) as client:
        whole = client.message("Hello", "hello", ring_version=1, positions_version=1, routes_version=1)
        client.send(whole[:length])
        if length > 0:  # an empty packet is a hang-up
            assert client.refusal() == "bad_message"
            assert elgate_daemon.wait_for_event("control_message_bad")["reason"]
        assert client.receive() == ("", b"")
    others_go_on(elgate_daemon)


FALSE_MESSAGES: dict[str, tuple[dict[str, int], str]] = {
    "magic": ({"magic": 1}, "bad_message"),
    "version": ({"version": 9}, "version_mismatch"),
    "length": ({"length_bytes": 8}, "bad_message"),
    "kind": ({"kind": 4711}, "out_of_order"),
}


@pytest.mark.parametrize("false", FALSE_MESSAGES)
def test_a_message_with_something_false_is_refused(false: str, elgate_daemon: ChildDaemon) -> None:
    changed, refusal = FALSE_MESSAGES[false]
    with RawClient(elgate_daemon.socket) as client:
        message = client.message("Hello", "hello", ring_version=1, positions_version=1, routes_version=1)
        for name, value in changed.items():
            HEADER.set(message, 0, name, value)
        client.send(message)
        assert client.refusal() == refusal
    others_go_on(elgate_daemon)


def test_a_client_of_another_ring_version_is_refused(elgate_daemon: ChildDaemon) -> None:
    with RawClient(elgate_daemon.socket) as client:
        client.send(client.message("Hello", "hello", ring_version=2, positions_version=1, routes_version=1))
        assert client.refusal() == "version_mismatch"


def test_requests_out_of_order_and_with_others_handles_are_refused(raw: RawClient, elgate_daemon: ChildDaemon) -> None:
    with RawClient(elgate_daemon.socket) as client:
        client.send(client.message("AttachThread", "attach_thread"))
        assert client.refusal() == "out_of_order"
        client.hello()
        client.send(client.message("Hello", "hello", ring_version=1, positions_version=1, routes_version=1))
        assert client.refusal() == "out_of_order"
        client.send(client.message("ReleaseFile", "release_file", file_id=raw.file_id, handle=raw.handle))
        assert client.refusal() == "unknown_handle"
        client.send(client.message("FenceFile", "fence_file", file_id=raw.file_id, handle=raw.handle))
        assert client.refusal() == "unknown_handle"
        client.send(client.message("RegisterFile", "register_file"))  # without a descriptor
        assert client.refusal() == "bad_message"
    raw.close()
    others_go_on(elgate_daemon)


def test_nobody_fills_the_daemons_log(raw: RawClient, elgate_daemon: ChildDaemon) -> None:
    """The first ones stand there, and the number of all."""
    daemon, count = elgate_daemon, 3000
    for _ in range(count):
        message = raw.message("AttachThread", "attach_thread")
        message[6:8] = (999).to_bytes(2, "little")
        raw.send(message)
        assert raw.refusal() == "bad_message"
    others_go_on(daemon)
    raw.close()
    assert daemon.stop() == 0
    said = daemon.events("control_message_bad")
    stopped = daemon.events("stopped")[-1]["counters"]
    # Of the first ones none, but where they come faster than they can be written down.
    assert 256 - stopped.get("events_dropped_total", 0) <= len(said) < 256 + 60
    assert said[0]["kind"] == 999
    assert stopped["messages_bad_total"] == count
    left_out = sum(event.get("left_out", 0) for event in said)
    left_out += sum(
        event["count"] for event in daemon.events("events_left_out") if event["of"] == "control_message_bad"
    )
    dropped = stopped.get("events_dropped_total", 0)
    assert left_out == stopped["events_left_out_total"]
    assert len(said) + left_out <= count <= len(said) + left_out + dropped


def test_descriptors_that_are_not_a_routed_file_are_refused(
    raw: RawClient, elgate_daemon: ChildDaemon, tmp_path: Path
) -> None:
    inside = elgate_daemon.route_dir
    (tmp_path / "elsewhere").touch()
    (inside / "two names").touch()
    os.link(inside / "two names", inside / "the other name")
    (inside / "plain").touch()
    cases = [
        (tmp_path / "elsewhere", os.O_WRONLY, "not_on_a_route"),
        (inside / "two names", os.O_WRONLY, "several_links"),
        (inside / "plain", os.O_RDONLY, "not_open_for_writing"),
        (inside, os.O_RDONLY, "not_a_regular_file"),
        (Path("/dev/null"), os.O_WRONLY, "not_a_regular_file"),
    ]
    for path, flags, refusal in cases:
        descriptor = os.open(path, flags)
        raw.send(raw.message("RegisterFile", "register_file"), descriptor)
        os.close(descriptor)
        assert raw.refusal() == refusal, path
    descriptor = os.open(inside / "plain", os.O_WRONLY)
    (inside / "plain").unlink()
    raw.send(raw.message("RegisterFile", "register_file"), descriptor)
    os.close(descriptor)
    assert raw.refusal() == "no_name"
    wait_until(
        lambda: any("removed" in event.get("hint", "") for event in elgate_daemon.events("file_stays_native")),
        "it says why",
        elgate_daemon,
    )
    # More descriptors than a message may carry: the session ends, and none of them leaks into the daemon.
    assert elgate_daemon.process is not None
    descriptors = Path(f"/proc/{elgate_daemon.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    many = [os.open("/dev/null", os.O_WRONLY) for _ in range(20)]
    raw.send(raw.message("RegisterFile", "register_file"), *many)
    for descriptor in many:
        os.close(descriptor)
    assert raw.refusal() == "bad_message"
    raw.close()
    wait_until(lambda: len(list(descriptors.iterdir())) <= before, "no descriptor is left over", elgate_daemon)
    others_go_on(elgate_daemon)


def test_random_messages(elgate_daemon: ChildDaemon) -> None:
    choices = random.Random(seed_of_this_run())
    for _ in range(200):
        with RawClient(elgate_daemon.socket) as client:
            if choices.random() < 0.5:
                client.hello()
            message = bytearray(choices.randbytes(choices.randrange(1, 600)))
            if choices.random() < 0.8 and len(message) >= HEADER.size:
                kind = choices.choice(list(KINDS.values()))
                message[: HEADER.size] = HEADER.pack(
                    magic=CONTROL_MAGIC, version=1, kind=kind, length_bytes=len(message), sequence=1
                )
            client.send(message)
    assert ENUMERATIONS["Refused.refusal"]
    others_go_on(elgate_daemon)
