"""Offsets and sizes of every field, read from docs/formats.md (which a test of the core holds against the types)."""

from __future__ import annotations

import re
import struct
from pathlib import Path

FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"

_SECTION = re.compile(r"^## (.+)$")
_STRUCTURE = re.compile(r"^### (\w+) \((\d+) bytes\)$")
_FIELD = re.compile(r"^\| (\d+) \| (\d+) \| `(\w+)` \|$")
_ENUMERATION = re.compile(r"^`([\w.]+)`: (.+)\.$")


class Structure:
    """One structure of the document: its size, and its fields by name."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fields: dict[str, tuple[int, int]] = {}

    def pack(self, **values: int | bytes) -> bytearray:
        memory = bytearray(self.size)
        for name, value in values.items():
            self.set(memory, 0, name, value)
        return memory

    def set(self, memory: bytearray | memoryview, base: int, name: str, value: int | bytes) -> None:
        offset, size = self.fields[name]
        raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        assert len(raw) == size, (name, size, value)
        memory[base + offset : base + offset + size] = raw

    def get(self, memory: bytes | bytearray | memoryview, base: int, name: str) -> int:
        offset, size = self.fields[name]
        return int.from_bytes(memory[base + offset : base + offset + size], "little")


def _parse() -> tuple[dict[str, dict[str, Structure]], dict[str, dict[str, int]]]:
    structures: dict[str, dict[str, Structure]] = {}
    enumerations: dict[str, dict[str, int]] = {}
    section = structure = None
    for line in FORMATS.read_text().splitlines():
        if match := _SECTION.match(line):
            section = structures.setdefault(match[1], {})
        elif (match := _STRUCTURE.match(line)) and section is not None:
            structure = section[match[1]] = Structure(int(match[2]))
        elif (match := _FIELD.match(line)) and structure is not None:
            structure.fields[match[3]] = (int(match[1]), int(match[2]))
        elif match := _ENUMERATION.match(line):
            enumerations[match[1]] = {
                name: int(value) for value, name in (item.split(" ") for item in match[2].split(", "))
            }
    return structures, enumerations


STRUCTURES, ENUMERATIONS = _parse()
RING, CONTROL, LOG = STRUCTURES["Ring"], STRUCTURES["Control messages"], STRUCTURES["Log"]
POSITIONS = STRUCTURES["Positions"]


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    crc = 0xFFFFFFFF
    for byte in bytes(data):
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


def state_word(state: str, span: int, owner: int, lap: int) -> int:
    return ENUMERATIONS["StateWord.state"][state] | span << 4 | owner << 13 | lap << 24


def u64(memory: bytes | bytearray | memoryview, offset: int) -> int:
    return struct.unpack_from("<Q", memory, offset)[0]
