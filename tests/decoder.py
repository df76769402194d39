"""A second reader of the format, written from docs/format.md alone.

It shares no code with lamina: plain Python, NumPy for views of bytes, and the hash functions from
packages of their own. It reads everything and checks everything, and takes the element types and
side tensors from the tables of the document itself.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import xxhash

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"
PAGE, LARGE, HUGE = 4096, 65_536, 2 << 20
BLOCK = 128 * 1024
WIDEST = 2**64 - 1


class FormatError(Exception):
    """Bytes are not what the document says."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise FormatError(message)


# ── The document ─────────────────────────────────────────────────────────────────────────────────


def section(heading: str) -> str:
    """Return the text below a heading of the document, up to the next heading."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)",
        DOCUMENT.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )
    assert found, f"docs/format.md has no section {heading!r}"
    return found[1]


def table(heading: str) -> list[dict[str, str]]:
    """Return the table of a section: each row as its columns' names and texts, backquotes off."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("`", "") for cell in line[1:-1].split(" | ")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def block(heading: str, language: str) -> str:
    """Return the first fenced block of a language in a section."""
    found = re.search(rf"^```{language}\n(.*?)^```$", section(heading), flags=re.DOTALL | re.M)
    assert found, f"no ```{language} in {heading!r}"
    return found[1]


def undump(text: str) -> bytes:
    """Return the bytes that a dump shows, as `hexdump -C` prints it (`*`: as the line before)."""
    data, line, repeated = bytearray(), b"", False
    for shown in text.splitlines():
        if shown == "*":
            repeated = True
            continue
        offset, _, rest = shown.partition("  ")
        while repeated and len(data) < int(offset, 16):
            data += line
        repeated = False
        assert len(data) == int(offset, 16), shown
        digits, _, letters = rest.partition("  |")
        line = bytes.fromhex(digits)
        printed = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)
        assert letters.removesuffix("|") == printed, shown
        data += line
    return bytes(data)


@cache
def element_sizes() -> dict[str, int]:
    return {row["name on disk"]: int(row["bytes"]) for row in table("Element types")}


@cache
def side_tensors() -> list[dict[str, str]]:
    return table("Side tensors")


# ── Checksums ────────────────────────────────────────────────────────────────────────────────────


def _crc_table() -> list[int]:
    entries = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        entries.append(crc)
    return entries


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFF_FFFF


def digest(data: bytes) -> str:
    """Return 128 bits of BLAKE3, as names and manifests have them."""
    return str(blake3.blake3(data).hexdigest(length=16))


def xxh3(data: bytes) -> tuple[int, int]:
    value = xxhash.xxh3_128_intdigest(data)
    return value & WIDEST, value >> 64


# ── The arithmetic of a shard ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block: int = BLOCK


def power_of_two(limit: int) -> int:
    """Return the largest power of two that is at most `limit`; 1 at least."""
    return 1 << (max(limit, 1).bit_length() - 1)


def row_bytes(site: list[Any]) -> int:
    _, dtype, shape = site
    return element_sizes()[dtype] * math.prod(shape)


def rows_per_shard(sites: list[Any], shard_bytes: int) -> int:
    return min(power_of_two(shard_bytes // (9 + sum(map(row_bytes, sites)))), 2**20)


def tier(group: dict[str, Any], site: list[Any]) -> str:
    region = group["rows_per_shard"] * row_bytes(site)
    names = [(HUGE, "2 MiB"), (LARGE, "64 KiB"), (PAGE, "4 KiB"), (1, "copy")]
    return next(name for size, name in names if region % size == 0)


def header_bytes(group: dict[str, Any]) -> int:
    """Return 8 + N: fixed by the sites, whatever the rows and prompts."""
    sites, sides = group["sites"], _sides(group)
    count = len(sites) + len(sides)
    tensors = [Tensor(f"#pad.{at}", "U8", (WIDEST,), WIDEST, 0) for at in range(count)]
    tensors += [Tensor(path, kind, (WIDEST,) * (1 + len(f)), WIDEST, 0) for path, kind, f in sites]
    for side in sides:
        shape = (WIDEST,) * (2 if side["name"] == "#xxh3" else 1)
        tensors.append(Tensor(side["name"], side["dtype"], shape, WIDEST, 0))
    return -(-(8 + len(header_text(tensors, 0, WIDEST))) // PAGE) * PAGE


def _sides(group: dict[str, Any]) -> list[dict[str, str]]:
    return [side for side in side_tensors() if group["texts"] or "text" not in side["name"]]


def layout(group: dict[str, Any], entry: dict[str, Any]) -> list[Tensor]:
    """Return every tensor of a shard, pads too, in the order of the file."""
    full = entry["rows"] == group["rows_per_shard"]
    at, index = header_bytes(group), 0
    tensors: list[Tensor] = []

    def pad(alignment: int) -> None:
        nonlocal at
        if at % alignment:
            missing = alignment - at % alignment
            tensors.append(Tensor(f"#pad.{index}", "U8", (missing,), at, missing))
            at += missing

    def add(name: str, dtype: str, shape: tuple[int, ...], alignment: int, block: int) -> None:
        nonlocal at, index
        pad(alignment)
        nbytes = element_sizes()[dtype] * math.prod(shape)
        tensors.append(Tensor(name, dtype, shape, at, nbytes, block))
        at, index = at + nbytes, index + 1

    for site in group["sites"]:
        path, dtype, feature = site
        large = full and tier(group, site) in ("2 MiB", "64 KiB")
        rows = power_of_two(BLOCK // row_bytes(site))
        shape = (entry["rows"], *feature)
        add(path, dtype, shape, LARGE if large else PAGE, rows * row_bytes(site))
    counts = {
        "rows": entry["rows"],
        "prompts": entry["prompts"],
        "ids": entry["ids"],
        "text_bytes": entry.get("text_bytes", 0),
    }
    checked = 0
    for side in _sides(group):
        if side["name"] == "#crc32c":
            pad(8)
            checked = len(tensors)
            counts["c"] = sum(-(-tensor.nbytes // tensor.block) for tensor in tensors)
            counts["t"] = checked
        shape = tuple(
            int(word) if word.isdigit() else counts[word]
            for word in side["shape"].strip("[]").split(", ")
        )
        add(side["name"], side["dtype"], shape, 8, BLOCK)
    return tensors


def header_text(tensors: list[Tensor], start: int, head: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "lamina 1", "head": str(head)}}
    for tensor in tensors:
        begin = tensor.offset - start
        offsets = [begin, WIDEST if begin == WIDEST else begin + tensor.nbytes]
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


def read_manifest(data: bytes) -> dict[str, Any]:
    require(data[-1:] == b"\n" and data[-34:-33] == b"\n", "not in two lines")
    text, check = data[:-34], data[-33:-1].decode("ascii")
    require(digest(text) == check, "the text has another checksum")
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def seal(text: str) -> bytes:
    """Return a manifest's bytes."""
    return f"{text}\n{digest(text.encode())}\n".encode()


def read_shard(group: dict[str, Any], entry: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return each tensor's bytes as NumPy has them (uint8 for sites), all of it checked."""
    tensors = layout(group, entry)
    start = header_bytes(group)
    end = tensors[-1].offset + tensors[-1].nbytes
    require(len(data) == end, f"{len(data)} bytes, not {end}")
    length = int.from_bytes(data[:8], "little")
    require(8 + length == start, "the length of the header")
    expected = header_text(tensors, start, entry["head"])
    require(data[8:start] == expected.ljust(length), "the header")
    found = {tensor.name: data[tensor.offset :][: tensor.nbytes] for tensor in tensors}
    names = [tensor.name for tensor in tensors]
    checked = tensors[: names.index("#crc32c")]
    tables = tensors[len(checked)].offset
    require(digest(data[:start] + data[tables:]) == entry["name"], "the name")
    crcs = np.frombuffer(found["#crc32c"], "<u4").tolist()
    hashes = np.frombuffer(found["#xxh3"], "<u8").reshape(-1, 2).tolist()
    for tensor, recorded in zip(checked, hashes, strict=True):
        bytes_of = found[tensor.name]
        require(list(xxh3(bytes_of)) == recorded, f"XXH3 of {tensor.name}")
        for at in range(0, tensor.nbytes, tensor.block):
            require(crc32c(bytes_of[at : at + tensor.block]) == crcs.pop(0), f"CRC {tensor.name}")
    require(not crcs, "more CRCs than blocks")
    for tensor in tensors:
        if tensor.name.startswith("#pad."):
            require(not any(found[tensor.name]), "a pad that is not zero")
    kinds = {"U8": "u1", "U32": "<u4", "U64": "<u8"}
    return {
        tensor.name: np.frombuffer(
            found[tensor.name], kinds[tensor.dtype] if tensor.name[0] == "#" else "u1"
        )
        for tensor in tensors
    }


@dataclass
class Prompt:
    start: int
    rows: int
    length: int
    ids: list[int]
    text: str | None
    shard: int


@dataclass
class Store:
    """What a directory holds, at one version."""

    format: str
    manifest: dict[str, Any]
    group: dict[str, Any]
    columns: dict[str, bytes] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)


def read_store(directory: Path, version: int | None = None) -> Store:
    """Read a store, every byte of it."""
    first = (directory / "FORMAT").read_text().splitlines()[0]
    found = re.fullmatch(r"lamina (\d+)\.(\d+)", first)
    require(found and found[1] == "1", f"format {first}")
    names = sorted(path.name for path in (directory / "manifests").glob("*.json"))
    name = names[-1] if version is None else f"{version:020}.json"
    manifest = read_manifest((directory / "manifests" / name).read_bytes())
    require(manifest["lamina"] == 1 and name == f"{manifest['version']:020}.json", "the version")
    (group,) = manifest["groups"]
    store = Store(first, manifest, group, {path: b"" for path, _, _ in group["sites"]})
    for at, entry in enumerate(group["shards"]):
        data = (directory / "shards" / f"{entry['name']}.safetensors").read_bytes()
        _add(store, at, entry, read_shard(group, entry, data))
    return store


def _add(store: Store, at: int, entry: dict[str, Any], shard: dict[str, Any]) -> None:
    row = len(store.tokens)
    store.shards.append(shard)
    for path in store.columns:
        store.columns[path] += shard[path].tobytes()
    store.tokens += shard["#row.token"].tolist()
    store.positions += shard["#row.position"].tolist()
    store.flags += shard["#row.flags"].tolist()
    start, ids_at, text_at = row + entry["head"], 0, 0
    ids = shard["#prompt.ids"].tolist()
    for index, (rows, length) in enumerate(
        zip(shard["#prompt.rows"].tolist(), shard["#prompt.length"].tolist(), strict=True)
    ):
        text = None
        if store.group["texts"]:
            nbytes = int(shard["#prompt.text_length"][index])
            text = shard["#prompt.text"][text_at : text_at + nbytes].tobytes().decode()
            text_at += nbytes
        here = ids[ids_at : ids_at + length]
        store.prompts.append(Prompt(start, rows, length, here, text, at))
        start, ids_at = start + rows, ids_at + length
    require(ids_at == entry["ids"] and text_at == entry.get("text_bytes", 0), "sums of the table")
    require(start >= row + entry["rows"], "rows of no prompt")
