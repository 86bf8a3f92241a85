"""Writes user.schema and user.packed by the layout in docs/PROTOCOL.md, with nothing of the server: `python make.py`."""

import struct
import zlib

FIELDS = [("age", "number"), ("country", "text"), ("tags", "list"), ("embedding", "vector"), ("history", "items")]
MADE_MS = 1_764_144_000_000


def schema_id(text: bytes) -> int:
    """FNV-1a, 64 bits."""
    hash = 0xCBF29CE484222325
    for byte in text:
        hash = (hash ^ byte) * 0x100000001B3 % 2**64
    return hash


def text(value: str | None) -> bytes:
    if value is None:
        return struct.pack("<I", 0xFFFFFFFF)
    data = value.encode()
    return struct.pack("<I", len(data)) + data


def field(kind: str, value) -> bytes:
    if kind == "number":
        return struct.pack("<f", float("nan") if value is None else value)
    if kind == "text":
        return text(value)
    values = value or []
    count = struct.pack("<I", len(values))
    if kind == "list":
        return count + b"".join(map(text, values))
    if kind == "vector":
        return count + struct.pack(f"<{len(values)}f", *values)
    return count + b"".join(struct.pack("<Bf", seen, weight) + text(item) for item, weight, seen in values)


def pack(schema: bytes, values: dict, made_ms: int) -> bytes:
    fields = [line.rsplit(":", 1) for line in schema.decode().splitlines()]
    rest = struct.pack("<Qq", schema_id(schema), made_ms) + b"".join(field(kind, values.get(name)) for name, kind in fields)
    return b"TSF\x01" + struct.pack("<I", zlib.crc32(rest)) + rest


if __name__ == "__main__":
    schema = "".join(f"{name}:{kind}\n" for name, kind in FIELDS).encode()
    user = {
        "age": 31,
        "country": "fr",
        "tags": ["a", "ß"],
        "embedding": [0.5, -2.0],
        "history": [("17", 0.5, False), ("3", 1.0, True)],
    }
    open("user.schema", "wb").write(schema)
    open("user.packed", "wb").write(pack(schema, user, MADE_MS))
    print(f"schema {schema_id(schema):016x}")
