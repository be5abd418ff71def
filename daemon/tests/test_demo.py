"""The demo's own judgement: it must find what is lost, damaged, doubled and out of order, and only that."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from elgate.daemon import places
from elgate.daemon.demo import driver, orders
from elgate.daemon.demo.verify import Verdict, Writer, parse_order, verify

WRITER = Writer(shop=1, run=2, thread=3)


def journal_of(*sequences: int, shop: int = 1, run: int = 2, thread: int = 3) -> bytes:
    return b"".join(orders.order_line(shop, run, thread, sequence).encode() for sequence in sequences)


def verdict_of(directory: Path, content: bytes, acknowledged: int) -> tuple[int, int, int, int, int, int]:
    (directory / "orders-001-003.log").write_bytes(content)
    verdict = verify(directory, {WRITER: acknowledged})
    assert verdict.ok == (not verdict.problems)
    return (
        verdict.found,
        verdict.lost,
        verdict.damaged,
        verdict.doubled,
        verdict.misordered,
        verdict.unacknowledged,
    )


def test_an_order_is_one_line_of_fixed_length_that_reads_back() -> None:
    line = orders.order_line(1, 2, 3, 4).encode()
    assert len(line) == orders.RECORD_BYTES
    assert parse_order(line) == (WRITER, 4)


@pytest.mark.parametrize("position", range(0, orders.RECORD_BYTES, 9))
def test_a_changed_byte_is_damage(position: int) -> None:
    line = bytearray(orders.order_line(1, 2, 3, 4).encode())
    line[position] ^= 1
    assert parse_order(bytes(line)) is None


def test_a_whole_journal_is_fine(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1, 2, 3), 3) == (3, 0, 0, 0, 0, 0)


def test_the_order_that_a_killed_writer_had_in_hand_may_be_there(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1, 2, 3), 2) == (2, 0, 0, 0, 0, 1)


def test_an_acknowledged_order_that_is_missing_is_lost(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1, 3), 3) == (2, 1, 0, 0, 0, 0)
    assert verdict_of(tmp_path, b"", 3) == (0, 3, 0, 0, 0, 0)


def test_a_torn_line_is_damage(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1) + journal_of(2)[:50], 1) == (1, 0, 1, 0, 0, 0)
    assert verdict_of(tmp_path, journal_of(1)[:50] + journal_of(2), 1) == (0, 1, 1, 0, 0, 0)


def test_a_hole_of_zeros_is_damage(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1) + bytes(128) + journal_of(3), 1)[:3] == (1, 0, 1)


def test_doubled_and_misordered_orders_are_found(tmp_path: Path) -> None:
    assert verdict_of(tmp_path, journal_of(1, 2, 2), 2) == (2, 0, 0, 1, 0, 0)
    assert verdict_of(tmp_path, journal_of(2, 1, 3), 3) == (3, 0, 0, 0, 1, 0)


def test_two_lives_of_a_shop_share_a_journal(tmp_path: Path) -> None:
    (tmp_path / "orders-001-003.log").write_bytes(journal_of(1, 2) + journal_of(1, 2, run=3) + journal_of(3))
    verdict = verify(tmp_path, {WRITER: 3, Writer(1, 3, 3): 2})
    assert (verdict.ok, verdict.found) == (True, 5)


def test_the_program_acknowledges_what_it_has_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["orders.py", str(tmp_path), "1", "2", "2"])
    monkeypatch.setattr("sys.stdin", io.StringIO("0.05\n"))
    assert orders.main() == 0
    said = capfd.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("ready", "done")
    acknowledged: dict[Writer, int] = {}
    for line in said[1:-1]:
        _, thread, sequence, _ = line.split()
        acknowledged[Writer(1, 2, int(thread))] = int(sequence)
    verdict = verify(tmp_path, acknowledged)
    assert verdict.ok
    assert verdict.acknowledged == verdict.found > 0


def test_the_program_knows_nothing_of_elgate() -> None:
    source = Path(orders.__file__).read_text()
    assert "import elgate" not in source
    assert "from elgate" not in source
    assert os.path.basename(orders.__file__) == "orders.py"


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole demo, in seconds."""
    for name, value in (
        ("ROUNDS", 1), ("ROUND_S", 0.3), ("WARM_UP_S", 0.1), ("UNDISTURBED_S", 0.2), ("SLICE_S", 0.1),
    ):  # fmt: skip
        monkeypatch.setattr(driver, name, value)


def test_the_demo_ends_with_one_json_object_and_leaves_nothing(
    short_demo: None, disk_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert driver.run_demo(disk_dir / "demo", keep=False, as_json=True) == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert document["ok"] is True
    assert (document["lost"], document["damaged"], document["doubled"], document["misordered"]) == (0, 0, 0, 0)
    assert document["acknowledged"] == document["found"] > 0
    assert document["kills"] == {"shop": 1, "daemon": 2}
    assert document["ratio"] > 0
    assert document["native"].keys() == document["elgate"].keys() == {"operations_per_s", "p50_us", "p95_us", "p99_us"}
    assert not (disk_dir / "demo").exists()


def test_the_demo_fails_where_an_order_is_lost_or_damaged_and_keeps_what_shows_it(
    short_demo: None, disk_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_after_damage(directory: Path, acknowledged: dict[Writer, int]) -> Verdict:
        if directory.name == "killed":
            journal = directory / "orders-001-001.log"
            journal.write_bytes(b"!" + journal.read_bytes()[1 : -10 * orders.RECORD_BYTES])
        return verify(directory, acknowledged)

    monkeypatch.setattr(driver, "verify", verify_after_damage)
    assert driver.run_demo(disk_dir / "demo", keep=False, as_json=True) == 1
    out = capfd.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document["ok"] is False
    assert document["damaged"] == 1
    assert document["lost"] in (10, 11)  # the first one, and the last ten, of which one may not be acknowledged
    assert "orders-001-001.log:1: damaged" in out
    assert (disk_dir / "demo" / "elgate" / "files" / "killed" / "orders-001-001.log").exists()


def test_the_demo_says_so_where_storage_is_volatile(
    short_demo: None, disk_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "VOLATILE_FILESYSTEMS", {places.filesystem_of(disk_dir).type})
    monkeypatch.setattr(driver, "VICTIMS", ())
    driver.run_demo(disk_dir / "demo", keep=False, as_json=True)
    out = capfd.readouterr().out
    assert "does not survive a power cut" in out
    assert json.loads(out.splitlines()[-1])["volatile"] is True


def test_the_demo_refuses_a_directory_that_is_there(disk_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert driver.run_demo(disk_dir, keep=False, as_json=False) == 1
    assert "File exists" in capfd.readouterr().out
    assert disk_dir.exists()
