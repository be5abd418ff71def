"""What is declared in Python is the header, whole."""

from __future__ import annotations

import re
from pathlib import Path

from elgate import _native

HEADER = (Path(__file__).parents[3] / "core/include/elgate_client.h").read_text()


def test_every_function_of_the_header_is_in_the_library() -> None:
    names = re.findall(r"^\w[\w ]*[ *](elgate_\w+)\(", HEADER, re.MULTILINE)
    assert len(names) > 20
    for name in names:
        assert callable(getattr(_native.library, name))


def test_every_constant_of_the_header_is_known() -> None:
    constants = re.findall(r"^#define (\w+) (\S+)", HEADER, re.MULTILINE)
    assert len(constants) > 10
    for name, value in constants:
        assert getattr(_native.library, name) == int(value)
    assert _native.NATIVE < -4095, "not an errno"
    assert list(_native.LEVELS.values()) == sorted(_native.LEVELS.values())


def test_the_status_has_every_field() -> None:
    structure = re.search(r"struct elgate_client_status \{(.*?)\};", HEADER, re.DOTALL)
    assert structure is not None
    assert re.findall(r"(\w+);", structure[1]) == list(_native.status())
