"""A client that does whatever a test wants, byte by byte: for everything that a well-behaved client never sends."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import threading
from pathlib import Path
from types import TracebackType

from formats import CONTROL, ENUMERATIONS, POSITIONS, RING, crc32c, state_word, u64

KINDS = ENUMERATIONS["MessageHeader.kind"]
REFUSALS = ENUMERATIONS["Refused.refusal"]
CONTROL_MAGIC = int.from_bytes(b"ELGC", "little")
HEADER = CONTROL["MessageHeader"]
ANSWER_LIMIT_S = 10.0

SLOTS = 1024
SLOT_BYTES = 4096
STATE_WORDS = 4096
PRODUCER_ROWS = 12288
SLOTS_OFFSET = 143360
ROUTE_POSITIONS = 4096
HANDLE_STATES = 135168


class RawClient:
    """Speaks the control protocol and writes slots. Single-threaded; the calling thread is its one producer."""

    def __init__(self, socket_path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(ANSWER_LIMIT_S)
        self.socket.connect(str(socket_path))
        self.descriptors: list[int] = []

    # ---- control messages ----------------------------------------------------------------------------------

    def message(self, structure: str, kind: str, **fields: int | bytes) -> bytearray:
        layout = CONTROL[structure]
        packed = layout.pack(**fields)
        header = HEADER.pack(magic=CONTROL_MAGIC, version=1, kind=KINDS[kind], length_bytes=layout.size, sequence=7)
        packed[: HEADER.size] = header
        return packed

    def send(self, message: bytes | bytearray, *descriptors: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([message], ancillary)

    def receive(self) -> tuple[str, bytes]:
        """Kind and bytes of the next answer; ("", b"") when the daemon has hung up."""
        data, ancillary, _, _ = self.socket.recvmsg(512, socket.CMSG_SPACE(4 * 4))
        for _, _, raw in ancillary:
            received = array.array("i")
            received.frombytes(raw[: len(raw) - len(raw) % received.itemsize])
            self.descriptors += received
        if not data:
            return "", b""
        kind = HEADER.get(data, 0, "kind")
        return next(name for name, value in KINDS.items() if value == kind), data

    def refusal(self) -> str:
        kind, data = self.receive()
        assert kind == "refused", kind
        value = CONTROL["Refused"].get(data, 0, "refusal")
        return next(name for name, number in REFUSALS.items() if number == value)

    def hello(self) -> None:
        self.send(
            self.message(
                "Hello",
                "hello",
                ring_version=1,
                positions_version=1,
                routes_version=1,
                runtime=b"test".ljust(16, b"\0"),
            )
        )
        kind, data = self.receive()
        assert kind == "welcome", kind
        ring_fd, positions_fd, _ = self.descriptors[:3]
        self.ring = mmap.mmap(ring_fd, CONTROL["Welcome"].get(data, 0, "ring_bytes"))
        self.positions_fd = positions_fd
        self.positions = mmap.mmap(
            positions_fd, CONTROL["Welcome"].get(data, 0, "positions_bytes"), prot=mmap.PROT_READ
        )

    def attach(self, *, falsely: bool = False) -> None:
        """`falsely`: the row says that this thread has it, and the kernel does not know."""
        self.send(self.message("AttachThread", "attach_thread"))
        kind, data = self.receive()
        assert kind == "thread_attached", kind
        self.row = CONTROL["ThreadAttached"].get(data, 0, "row")
        offset = PRODUCER_ROWS + self.row * RING["ProducerRow"].size
        if falsely:
            self.ring[offset : offset + 4] = threading.get_native_id().to_bytes(4, "little")
            return
        # The row's mutex is a robust pthread mutex; the C library is what locks it.
        libc = ctypes.CDLL(None, use_errno=True)
        mutex = ctypes.c_char.from_buffer(self.ring, offset)
        assert libc.pthread_mutex_lock(ctypes.byref(mutex)) == 0
        del mutex

    def register(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.send(self.message("RegisterFile", "register_file"), descriptor)
        os.close(descriptor)
        kind, data = self.receive()
        assert kind == "file_registered", kind
        layout = CONTROL["FileRegistered"]
        self.file_id, self.handle, self.route = (layout.get(data, 0, name) for name in ("file_id", "handle", "route"))

    # ---- slots ---------------------------------------------------------------------------------------------

    @property
    def head(self) -> int:
        return RING["Header"].get(self.ring, 0, "head")

    def word_offset(self, position: int) -> int:
        return STATE_WORDS + position % SLOTS * 8

    def set_word(self, position: int, state: str, span: int, owner: int | None = None) -> None:
        word = state_word(state, span, self.row if owner is None else owner, position // SLOTS)
        self.ring[self.word_offset(position) : self.word_offset(position) + 8] = word.to_bytes(8, "little")

    def lap(self, position: int) -> int:
        """Of the slot's state word: another one than the position's once the slot has been given back."""
        return u64(self.ring, self.word_offset(position)) >> 24

    def put(self, payload: bytes, *, span: int | None = None, commit: bool = True, **false: int) -> int:
        """An append at the head. `false` replaces fields of the slot header (before its checksum is computed, unless
        it is the checksum). No other producer may be at work. Returns the position."""
        true_span = (64 + len(payload) + SLOT_BYTES - 1) // SLOT_BYTES
        position = self.head
        assert position % SLOTS + true_span <= SLOTS
        self.set_word(position, "claimed", true_span)
        RING["Header"].set(self.ring, 0, "head", position + true_span)
        slot = SLOTS_OFFSET + position % SLOTS * SLOT_BYTES
        self.ring[slot + 64 : slot + 64 + len(payload)] = payload
        layout = RING["SlotHeader"]
        fields = {
            "payload_checksum": crc32c(payload),
            "length_bytes": len(payload),
            "operation": ENUMERATIONS["SlotHeader.operation"]["append"],
            "position": position,
            "file_id": self.file_id,
            "handle": self.handle,
            **{name: value for name, value in false.items() if name != "header_checksum"},
        }
        header = layout.pack(**fields)
        layout.set(header, 0, "header_checksum", false.get("header_checksum", crc32c(header[4:56])))
        self.ring[slot : slot + 64] = bytes(header)
        if commit:
            self.set_word(position, "committed", true_span if span is None else span)
            self.ring_doorbell()
        return position

    def ring_doorbell(self) -> None:
        """By a message: the worker is woken for it, and looks at the ring too."""
        self.send(self.message("AttachThread", "attach_thread"))
        self.receive()

    def applied(self) -> int:
        return POSITIONS["RoutePositions"].get(self.positions, ROUTE_POSITIONS + self.route * 128, "applied")

    def sole_route(self) -> int:
        return POSITIONS["Header"].get(self.positions, 0, "sole_route")

    def error(self) -> tuple[int, int]:
        """(sequence, errno) of our handle."""
        layout, base = POSITIONS["HandleState"], HANDLE_STATES + self.handle * 32
        return layout.get(self.positions, base, "error_sequence"), layout.get(self.positions, base, "error_errno")

    def tail(self) -> int:
        return u64(self.ring, RING["Header"].fields["tail"][0])

    def close(self) -> None:
        self.socket.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
