"""What is packed for a GPU machine without a network: one GPU's machine code."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import pytest

PTX, CUBIN = 1, 2


@pytest.fixture(scope="module")
def pack():
    path = Path(__file__).parents[2] / "scripts" / "gpu_pack.py"
    spec = importlib.util.spec_from_file_location("gpu_pack", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def container(*entries):
    """Code of each entry: its kind and target, 7 times."""
    body = b""
    for kind, target in entries:
        head = struct.pack("<HHIQ", kind, 0x101, 64, 7) + bytes(12) + struct.pack("<I", target) + bytes(32)
        body += head + bytes([target]) * 7
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("entries", "arch", "kept"),
    [
        ([(CUBIN, 80), (CUBIN, 90), (CUBIN, 120), (PTX, 121)], 90, 1),
        ([(CUBIN, 80), (CUBIN, 86)], 89, 1),
        ([(CUBIN, 80), (PTX, 75), (PTX, 80), (PTX, 100)], 90, 2),
    ],
)
def test_only_the_code_that_the_gpu_would_load_is_left(pack, entries, arch, kept):
    library = bytearray(b"\x7fELF" + b"\x50\xed\x55\xba" + bytes(9) + container(*entries) + b"tail")
    whole = bytes(library)
    assert pack.slimmed(library, arch) == 7 * (len(entries) - 1)
    code = [library[17 + 16 + 71 * number + 64 :][:7] for number in range(len(entries))]
    assert [any(one) for one in code] == [number == kept for number in range(len(entries))]
    assert library[:33] == whole[:33] and library.endswith(b"tail") and len(library) == len(whole)


@pytest.mark.parametrize(
    "code", [bytes(100), b"\x50\xed\x55\xba" + bytes(96), struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 80) + b"\x07" * 96]
)
def test_a_library_without_device_code_stays_as_it_is(pack, code):
    library = bytearray(b"\x7fELF" + code)
    assert pack.slimmed(library, 90) == 0 and library == b"\x7fELF" + code
