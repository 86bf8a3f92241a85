"""Writes format-1.log: a segment of the event log as it was before records had kinds. Needs `pip install xxhash`."""

import pathlib
import struct

import xxhash


def text(value: str) -> bytes:
    return struct.pack("<H", len(value.encode())) + value.encode()


def event(time_ms: int, event_id: str, user: str, item: str, kind: str, value: float = float("nan"), context=()) -> bytes:
    out = struct.pack("<qf", time_ms, value) + b"".join(map(text, [event_id, user, item, kind]))
    return out + bytes([len(context)]) + b"".join(text(key) + text(value) for key, value in context)


def record(sequence: int, payload: bytes) -> bytes:
    checksum = xxhash.xxh3_64_intdigest(payload, seed=sequence)
    return struct.pack("<IQQ", len(payload), sequence, checksum) + payload


header = b"TSTMEVNT" + struct.pack("<IIQ", 1, 0, 0)
header += struct.pack("<Q", xxhash.xxh3_64_intdigest(header))
records = [
    event(1_700_000_000_000, "e1", "a", "3", "view"),
    event(1_700_000_001_000, "e2", "a", "4", "rating", 4.5, [("page", "1")]) + event(1_700_000_002_000, "", "b", "3", "like"),
]
body = b"".join(record(sequence, payload) for sequence, payload in enumerate(records))
pathlib.Path(__file__).with_name("format-1.log").write_bytes(header + body)
