#!/usr/bin/env python3
# SPDX-FileCopyrightText: the llmd authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a model file by docs/model-file.md alone, without our C code, and compares every element of
every type and layout with the numbers that `test-model-file --write` puts in.

    test-model-file.py TEST_MODEL_FILE     (the program; it writes a model into a temporary folder)
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    print("skipped: numpy is not installed")
    sys.exit(77)

PREFIX = b'{"__metadata__":{"llmd.header_sha256":"'


def up(n, align):
    return (n + align - 1) // align * align


# The container.


class ModelFile:
    def __init__(self, path):
        with open(path, "rb") as f:
            self.bytes = f.read()
        (n,) = struct.unpack("<Q", self.bytes[:8])
        text = self.bytes[8 : 8 + n]
        start = 8 + n
        assert len(text) == n and start % 4096 == 0
        assert text.startswith(PREFIX) and text[len(PREFIX) + 64 :].startswith(b'",')
        claimed = text[len(PREFIX) : len(PREFIX) + 64].decode()
        zeroed = PREFIX + b"0" * 64 + text[len(PREFIX) + 64 :]
        assert hashlib.sha256(zeroed).hexdigest() == claimed

        table = json.loads(text)
        self.metadata = table.pop("__metadata__")
        assert all(isinstance(v, str) for v in self.metadata.values())
        assert self.metadata["llmd.format"] == "1"
        described = json.loads(self.metadata["llmd.tensors"])
        assert described.keys() == table.keys()

        self.entries = {}
        end = 0
        for name, t in sorted(table.items(), key=lambda i: i[1]["data_offsets"]):
            d = described[name]
            begin, after = t["data_offsets"]
            assert begin == end < after, name
            end = after
            payload = begin + d["pad"]
            size = after - payload
            assert payload == up(begin, 4096 if size >= 4096 else 64), name
            assert not any(self.bytes[start + begin : start + payload]), name
            data = self.bytes[start + payload : start + after]
            assert hashlib.sha256(data).hexdigest() == d["sha256"], name
            if d["type"] != "blob" and d["layout"] == "plain" and d["pad"] == 0:
                shape = d["shape"][1:] if d["shape"][0] == 1 else d["shape"]
                assert (t["dtype"], t["shape"]) == ("F32", shape), name
            else:
                assert (t["dtype"], t["shape"]) == ("U8", [after - begin]), name
            self.entries[name] = (d, data)
        assert start + end == len(self.bytes)


# The layouts: each returns (f32 [n_out, n_in], bytes it takes).

PLAIN_TYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


def floats(type_, data):
    """Elements of an unquantised type, whatever the shape of data (uint8 in the last axis)."""
    x = np.ascontiguousarray(data).view(PLAIN_TYPES[type_])
    if type_ == "bf16":
        return (x.astype("<u4") << 16).view("<f4")
    return x.astype(np.float32)


def low_high(b):
    """The two nibbles of each byte as values -8..7."""
    return (b & 15).astype(np.int8) - 8, (b >> 4).astype(np.int8) - 8


def blocks_of_32(b, n):
    """q4 as it lies along a row or a column: per 32 values, byte j has j low and 16 + j high."""
    low, high = low_high(b.reshape(*b.shape[:-1], n // 32, 16))
    return np.concatenate([low, high], axis=-1).reshape(*b.shape[:-1], n)


def read_plain(type_, n_out, n_in, b):
    assert type_ == "f32"
    return floats("f32", b[: 4 * n_out * n_in]).reshape(n_out, n_in), 4 * n_out * n_in


def read_tile16(type_, n_out, n_in, b):
    n_stripes = up(n_out, 16) // 16
    if type_ in PLAIN_TYPES:
        per_word = 1 if type_ == "f32" else 2
        n_lines = up(n_in, per_word) // per_word
        size = n_stripes * n_lines * 64
        # [stripe][line][row][k in the word]
        x = floats(type_, b[:size]).reshape(n_stripes, n_lines, 16, per_word)
        x = x.transpose(0, 2, 1, 3).reshape(n_stripes * 16, n_lines * per_word)
        assert not x[n_out:].any() and not x[:, n_in:].any()  # filled with zeros
        return x[:n_out, :n_in], size
    per_line = 4 if type_ == "q8" else 8
    quants, scales = n_in // per_line * 64, n_in // 32 * 32
    stripe = up(quants + scales, 64)
    s = b[: n_stripes * stripe].reshape(n_stripes, stripe)
    q = np.ascontiguousarray(s[:, :quants]).reshape(n_stripes, n_in // per_line, 16, 4)
    if type_ == "q8":
        q = q.view(np.int8)
    else:
        q = np.concatenate(low_high(q), axis=-1)
    q = q.transpose(0, 2, 1, 3).reshape(n_stripes * 16, n_in)
    d = floats("f16", s[:, quants : quants + scales]).reshape(n_stripes, n_in // 32, 16)
    d = d.transpose(0, 2, 1).reshape(n_stripes * 16, n_in // 32)
    assert not s[:, quants + scales :].any() and not d[n_out:].any()
    return (q * np.repeat(d, 32, axis=1))[:n_out], n_stripes * stripe


def read_rows(type_, n_out, n_in, b):
    if type_ in PLAIN_TYPES:
        used = n_in * np.dtype(PLAIN_TYPES[type_]).itemsize
        rows = b[: n_out * up(used, 64)].reshape(n_out, up(used, 64))
        assert not rows[:, used:].any()
        return floats(type_, rows[:, :used]), rows.size
    quants = n_in if type_ == "q8" else n_in // 2
    used = quants + n_in // 32 * 2
    rows = b[: n_out * up(used, 64)].reshape(n_out, up(used, 64))
    assert not rows[:, used:].any()
    q = np.ascontiguousarray(rows[:, :quants])
    q = q.view(np.int8) if type_ == "q8" else blocks_of_32(q, n_in)
    d = floats("f16", rows[:, quants:used])
    return q * np.repeat(d, 32, axis=1), rows.size


def read_cols(type_, n_out, n_in, b):
    if type_ in PLAIN_TYPES:
        used = n_out * np.dtype(PLAIN_TYPES[type_]).itemsize
        cols = b[: n_in * up(used, 64)].reshape(n_in, up(used, 64))
        assert not cols[:, used:].any()
        return floats(type_, cols[:, :used]).T, cols.size
    quants = n_out if type_ == "q8" else n_out // 2
    scales, line = up(2 * n_out, 64), up(quants, 64)
    block = scales + 32 * line
    blocks = b[: n_in // 32 * block].reshape(n_in // 32, block)
    d = floats("f16", blocks[:, : 2 * n_out])  # [block][n_out]
    lines = blocks[:, scales:].reshape(n_in, line)
    assert not lines[:, quants:].any() and not blocks[:, 2 * n_out : scales].any()
    q = np.ascontiguousarray(lines[:, :quants])
    q = q.view(np.int8) if type_ == "q8" else blocks_of_32(q, n_out)
    return (q * np.repeat(d, 32, axis=0)).T, blocks.size


READERS = {"plain": read_plain, "tile16": read_tile16, "rows": read_rows, "cols": read_cols}


# What the C program puts in.


def sample_bits(name, n):
    h = 2166136261
    for c in name.encode():
        h = (h ^ c) * 16777619 & 0xFFFFFFFF
    h = np.full(n, h, np.uint32)
    i = np.arange(n, dtype=np.uint32)
    for shift in (0, 8, 16, 24):
        h = (h ^ (i >> np.uint32(shift) & np.uint32(255))) * np.uint32(16777619)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    return h ^ h >> np.uint32(13)


def expected(name, type_, n_out, n_in):
    h = sample_bits(name, n_out * n_in).astype(np.int64)
    if type_ in PLAIN_TYPES:
        return ((h % 256 - 128) / 64).astype(np.float32).reshape(n_out, n_in)
    q = h % 16 - 8 if type_ == "q4" else h % 256 - 128
    d = (1 + (sample_bits(name, n_out * n_in // 32) >> np.uint32(8)) % 1000) / 512
    d = d.astype(np.float16).astype(np.float32).reshape(n_out, n_in // 32)
    return q.astype(np.float32).reshape(n_out, n_in) * np.repeat(d, 32, axis=1)


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        subprocess.run([sys.argv[1], "--write", path], check=True)
        model = ModelFile(path)
    seen = set()
    for name, (d, data) in model.entries.items():
        if d["type"] == "blob":
            assert data == (sample_bits(name, len(data)) & np.uint32(255)).astype(np.uint8).tobytes()
            seen.add("blob")
            continue
        n_out, n_in = d["shape"]
        x, size = READERS[d["layout"]](d["type"], n_out, n_in, np.frombuffer(data, np.uint8))
        assert size == len(data), name
        assert x.shape == (n_out, n_in), name
        assert np.array_equal(x, expected(name, d["type"], n_out, n_in)), name
        seen.add((d["type"], d["layout"]))
    layouts = ("tile16", "rows", "cols")
    types = ("f32", "f16", "bf16", "q8", "q4")
    assert seen == {"blob", ("f32", "plain")} | {(t, l) for t in types for l in layouts}
    print(f"{len(model.entries)} entries agree")


if __name__ == "__main__":
    main()
