"""An ordinary program that does at random what programs do with files, and knows what must be in them.

`python torture_program.py DIRECTORY SEED OPERATIONS [JOURNAL]`: prints its count now and then, and `done` at the end, when
every file has been read back through the hooks. What is wrong ends it, with the operations that led there.

JOURNAL, a file on no route, gets a line for each fsync that has returned (`synced`, path, length, digest) and before each
operation that changes a file after that (`changing`, path).
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections import deque
from typing import NoReturn

import elgate

assert elgate.patch_all()

PROGRESS_EVERY = 20
LENGTHS = (1, 10, 100, 100, 1000, 5000, 70_000)


class Program:
    def __init__(self, root: str, seed: int, journal: str | None = None) -> None:
        self.journal = None if journal is None else os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.synced: set[str] = set()
        self.root = root
        self.seed = seed
        self.dice = random.Random(seed)
        self.models: dict[str, bytearray] = {}
        # The descriptor of those that are open, and whether it appends.
        self.opened: dict[str, tuple[int, bool]] = {}
        self.history: deque[tuple[object, ...]] = deque(maxlen=60)
        self.records = 0
        os.makedirs(f"{root}/sub")

    def note(self, *what: object) -> None:
        self.history.append(what)

    def fail(self, why: str, path: str) -> NoReturn:
        for what in self.history:
            print("  ", *what)
        with open(path, "rb") as file:
            found = file.read()
        expected = bytes(self.models[path])
        pairs = zip(found, expected, strict=False)
        shorter = min(len(found), len(expected))
        at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
        print(f"{path}: {why}: {len(found)} bytes, not {len(expected)}; the first difference at {at}:")
        print(f"  {found[at : at + 40]!r}\n  {expected[at : at + 40]!r}\nseed {self.seed}", flush=True)
        os._exit(3)

    def note_synced(self, path: str) -> None:
        if self.journal is not None:
            digest = hashlib.sha1(self.models[path]).hexdigest()
            os.write(self.journal, f"synced {path} {len(self.models[path])} {digest}\n".encode())
            self.synced.add(path)

    def note_changing(self, *paths: str) -> None:
        for path in paths:
            if self.journal is not None and path in self.synced:
                os.write(self.journal, f"changing {path}\n".encode())
                self.synced.remove(path)

    def some_path(self) -> str:
        return f"{self.root}/{self.dice.choice(['', 'sub/'])}f{self.dice.randrange(8)}"

    def some_closed(self) -> str | None:
        closed = [path for path in self.models if path not in self.opened]
        return self.dice.choice(closed) if closed else None

    def data(self) -> bytes:
        self.records += 1
        length = self.dice.choice(LENGTHS) if self.dice.random() < 0.97 else 300_000
        text = b"%d:%d;" % (self.seed, self.records)
        return (text * (length // len(text) + 1))[:length]

    def check(self, path: str) -> None:
        with open(path, "rb") as file:
            if file.read() != self.models[path]:
                self.fail("wrong content", path)

    # --- Operations ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        path = self.some_path()
        if path in self.opened:
            return
        append, truncate = self.dice.random() < 0.5, self.dice.random() < 0.3
        flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if append else 0) | (os.O_TRUNC if truncate else 0)
        if truncate:
            self.note_changing(path)
        self.note("open", path, "append" if append else "", "truncate" if truncate else "")
        self.opened[path] = (os.open(path, flags, 0o644), append)
        if truncate or path not in self.models:
            self.models[path] = bytearray()

    def write(self, path: str) -> None:
        fd, append = self.opened[path]
        model, data = self.models[path], self.data()
        self.note_changing(path)
        if append:
            self.note("append", path, len(data), "at", len(model))
            assert os.write(fd, data) == len(data)
            model += data
            return self.sync_now_and_then(path)
        at = self.dice.randrange(len(model) + 1) if self.dice.random() < 0.7 else len(model)
        self.note("pwrite", path, len(data), "at", at)
        assert os.pwrite(fd, data, at) == len(data)
        model[at : at + len(data)] = data
        return self.sync_now_and_then(path)

    def sync_now_and_then(self, path: str) -> None:
        if self.journal is not None and self.dice.random() < 0.5:
            self.sync(path)

    def sync(self, path: str) -> None:
        self.note("fsync", path)
        os.fsync(self.opened[path][0])
        self.note_synced(path)

    def truncate(self, path: str) -> None:
        length = self.dice.randrange(len(self.models[path]) + 1)
        self.note("ftruncate", path, length)
        self.note_changing(path)
        os.ftruncate(self.opened[path][0], length)
        del self.models[path][length:]

    def close(self, path: str) -> None:
        self.note("close", path)
        os.close(self.opened.pop(path)[0])
        if self.dice.random() < 0.5:
            self.check(path)

    def rename(self, path: str) -> None:
        target = self.some_path()
        if target == path or target in self.opened:
            return
        self.note("rename", path, target)
        self.note_changing(path, target)
        os.rename(path, target)
        self.models[target] = self.models.pop(path)
        if path in self.opened:
            self.opened[target] = self.opened.pop(path)

    def unlink(self, path: str) -> None:
        self.note("unlink", path)
        self.note_changing(path)
        os.unlink(path)
        del self.models[path]
        if path in self.opened:
            fd, append = self.opened.pop(path)
            os.ftruncate(fd, 0)
            os.write(fd, b"nobody else's") if append else os.pwrite(fd, b"nobody else's", 0)
            assert os.pread(fd, 20, 0) == b"nobody else's"
            os.close(fd)

    def replace(self) -> None:
        path = self.some_path()
        if path in self.opened:
            return
        data = self.data()
        self.note("replace", path, len(data))
        self.note_changing(path)
        with open(f"{path}.new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
        self.models[path] = bytearray(data)

    def look(self, path: str) -> None:
        self.note("look", path)
        if os.fstat(self.opened[path][0]).st_size != len(self.models[path]):
            self.fail("wrong size", path)
        if self.dice.random() < 0.5:
            self.check(path)

    def step(self) -> None:
        kind = self.dice.random()
        if kind < 0.12 or not self.opened:
            return self.open()
        path = self.dice.choice(list(self.opened))
        if kind < 0.52:
            return self.write(path)
        if kind < 0.62:
            return self.sync(path)
        if kind < 0.68:
            return self.truncate(path)
        if kind < 0.76:
            return self.close(path)
        if kind < 0.82:
            return self.rename(path)
        if kind < 0.85:
            return self.unlink(path)
        if kind < 0.90:
            closed = self.some_closed()
            if closed is not None:
                (self.unlink if self.dice.random() < 0.3 else self.rename)(closed)
            return None
        return self.look(path) if kind < 0.96 else self.replace()

    def run(self, operations: int) -> None:
        for number in range(operations):
            if number % PROGRESS_EVERY == 0:
                print(number, flush=True)
            try:
                self.step()
            except OSError as error:
                self.note(repr(error))
                for what in self.history:
                    print("  ", *what)
                print(f"seed {self.seed}", flush=True)
                raise
        for path in list(self.opened):
            self.close(path)
        for path in self.models:
            self.check(path)
        print("done", flush=True)


if __name__ == "__main__":
    program = Program(sys.argv[1], int(sys.argv[2]), *sys.argv[4:])
    program.run(int(sys.argv[3]))
    sys.stdin.readline()
    elgate.unpatch_all()
    for path in program.models:
        program.check(path)
