"""Ways to spoil an artifact: what disks, downloads and attackers do to its files.

An artifact is a dict of file name → bytes, or `Link` or `Folder` where something other than a file is. A
mutation changes it in place, with draws from a seeded generator. `mend` then makes sizes, checksums and
index fit again as well as it can: the result is a forgery, which only the reader's own rules can refuse.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

MANIFEST = "delta_config.json"
INDEX = "delta.safetensors.index.json"


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    to: str


@dataclass(frozen=True)
class Folder:
    """A directory where a file should be."""


Files = dict[str, Any]

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 70, 2**31, 2**32 - 1, 2**40, 2**40 + 1, 2**53, 2**63),
    *(2**64, 10**30, -(2**63), 0.5, 1.0, -0.0, 1e308, 5e-324),
    *("", "x", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "ß∞", "__metadata__", "0" * 64),
    *("bands", "exact", "same", "signs", "signs+bands", "bfloat16", "float64", "int8", "complex64"),
    *([], {}, [[]], [0], [1, 1], [2**40, 2**40], [[16, 1]], [[1, 2**40]], [[5, 1]], [[2, 1]] * 65),
    *([0, 7], [7, 9], [7, 70], [9, 70], [70, 7], {"a": {}}, "U8", "F64", [0, 2**60], [5, 4]),
]


def mutate(files: Files, draw: Random) -> list[str]:
    """Spoils an artifact in one to three ways; returns their names."""
    chosen = draw.choices(MUTATIONS, k=draw.choice([1, 1, 1, 2, 3]))
    for mutation in chosen:
        mutation(files, draw)
    return [mutation.__name__ for mutation in chosen]


def mend(files: Files) -> None:
    """Makes index, sizes and checksums match the files, where these can still be read."""
    manifest, index = _parsed(files.get(MANIFEST)), _parsed(files.get(INDEX))
    if isinstance(manifest, dict):
        shards, carried = manifest.get("shards"), manifest.get("files")
        for infos in (shards, carried):
            for name, info in infos.items() if isinstance(infos, dict) else ():
                content = files.get(name)
                if isinstance(content, bytes) and isinstance(info, dict):
                    info["bytes"], info["sha256"] = len(content), _sha256(content)
        files[MANIFEST] = json.dumps(manifest, separators=(",", ":")).encode() + b"\n"
        weight_map = {}
        for name in shards if isinstance(shards, dict) else ():
            header = _header(files.get(name))
            weight_map |= dict.fromkeys((key for key in header if key != "__metadata__"), name)
        if isinstance(index, dict):
            index["weight_map"] = weight_map
    if isinstance(index, dict) and isinstance(files.get(MANIFEST), bytes):
        index["metadata"] = {"sha256": _sha256(files[MANIFEST])}
        files[INDEX] = json.dumps(index).encode()


# --- bytes ---------------------------------------------------------------------------------------


def flip_bits(files: Files, draw: Random) -> None:
    name, content = _any(files, draw)
    spoiled = bytearray(content)
    for _ in range(draw.randint(1, 8) if content else 0):
        spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
    files[name] = bytes(spoiled)


def overwrite(files: Files, draw: Random) -> None:
    name, content = _any(files, draw)
    at, size = draw.randint(0, len(content)), draw.choice([1, 4, 16, 512])
    filler = draw.choice([b"\0" * size, b"\xff" * size, draw.randbytes(size), b"{" * size])
    files[name] = content[:at] + filler + content[at + size :]


def truncate(files: Files, draw: Random) -> None:
    name, content = _any(files, draw)
    files[name] = content[: draw.choice([0, 1, 8, len(content) - 1, draw.randint(0, len(content))])]


def extend(files: Files, draw: Random) -> None:
    name, content = _any(files, draw)
    files[name] = content + draw.choice([b"\0", b" ", b"\n", b"}", draw.randbytes(40), content])


def cut_or_repeat(files: Files, draw: Random) -> None:
    name, content = _any(files, draw)
    start, stop = sorted(draw.randint(0, len(content)) for _ in range(2))
    files[name] = draw.choice([content[:start] + content[stop:], content[:stop] + content[start:]])


# --- files ---------------------------------------------------------------------------------------


def remove(files: Files, draw: Random) -> None:
    files.pop(draw.choice(sorted(files)), None)


def swap(files: Files, draw: Random) -> None:
    one, other = draw.choice(sorted(files)), draw.choice(_shards(files) or sorted(files))
    files[one], files[other] = files[other], files[one]


def duplicate(files: Files, draw: Random) -> None:
    name = draw.choice(_shards(files) or sorted(files))
    to = draw.choice(["model.safetensors", "delta-00009-of-00009.safetensors", f"copy-{name}"])
    files[draw.choice([to, *_shards(files)])] = files[name]


def rename(files: Files, draw: Random) -> None:
    """Renames a file, or what manifest and index call it."""
    name = draw.choice(_shards(files) or sorted(files))
    names = [f"../{name}", f"/tmp/{name}", f"x/{name}", f"{name}\0", "weights.bin", name.upper()]
    to = draw.choice([*names, "delta-00001-of-00002.safetensors", "tokenizer.json"])
    if draw.random() < 0.7:
        for text in (MANIFEST, INDEX):
            if isinstance(files.get(text), bytes):
                escaped = json.dumps(to)[1:-1].encode()
                files[text] = files[text].replace(name.encode(), escaped)
    if "/" not in to and "\0" not in to:
        files[to] = files.pop(name)


def link(files: Files, draw: Random) -> None:
    name = draw.choice(sorted(files))
    targets = ["/dev/zero", "/dev/null", "/etc/passwd", "/", ".", name, "nowhere", "/proc/self/mem"]
    files[name] = Link(draw.choice([*targets, *(n for n in sorted(files) if n != name)]))


def folder(files: Files, draw: Random) -> None:
    files[draw.choice(sorted(files))] = Folder()


# --- JSON ----------------------------------------------------------------------------------------


def edit_manifest(files: Files, draw: Random) -> None:
    _edit_file(files, MANIFEST, draw)


def edit_index(files: Files, draw: Random) -> None:
    _edit_file(files, INDEX, draw)


def edit_carried(files: Files, draw: Random) -> None:
    _edit_file(files, draw.choice(["tuned_config.json", "generation_config.json"]), draw)


def declare(files: Files, draw: Random) -> None:
    """Declares another shape, plan, dtype or size: the fields that say how many bytes there are."""
    document = _parsed(files.get(MANIFEST))
    tensors = document.get("tensors") if isinstance(document, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        return
    record = tensors[draw.choice(sorted(tensors))]
    if not isinstance(record, dict):
        return
    keys = [
        "shape",
        "base_shape",
        "plan",
        "exact_rows",
        "sign_scales",
        "dtype",
        "kind",
        "transposed",
    ]
    key = draw.choice(keys)
    value = record.get(key)
    if isinstance(value, list) and value and draw.random() < 0.7:
        _edit(value, draw)
    else:
        record[key] = copy.deepcopy(draw.choice(ODD))
    if draw.random() < 0.3:
        document["group_size"] = draw.choice([0, 1, 32, 41, 64, 128, 2**20, 2**20 + 1, -40])
    files[MANIFEST] = json.dumps(document).encode()


def bomb(files: Files, draw: Random) -> None:
    """JSON that is small to write and large to read."""
    size = draw.choice([100, 10_000, 300_000])
    text = draw.choice(
        [
            b"[" * size,
            b'{"a":' * size + b"1" + b"}" * size,
            b"[" + b"[]," * size + b"0]",
            b'{"schema":1,"x":' + b"9" * size + b"}",
            b'{"schema":1,"x":1e' + b"9" * size + b"}",
            b'{"schema":1,"x":0.' + b"3" * size + b"}",
            b"{" + b'"a":{},' * size + b'"a":{}}',
            b'{"schema":1,"tensors":{' + b'"' + b"n" * size + b'":{}}}',
            b'{"schema":1,"x":NaN}',
            b'{"schema":1,"schema":1}',
        ]
    )
    files[draw.choice([MANIFEST, INDEX, "tuned_config.json"])] = text


# --- safetensors headers -------------------------------------------------------------------------


def edit_header(files: Files, draw: Random) -> None:
    name = draw.choice(_shards(files) or [""])
    header = _header(files.get(name))
    if not header:
        return
    length = 8 + int.from_bytes(files[name][:8], "little")
    _edit(header, draw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    files[name] = struct.pack("<Q", len(text)) + text + files[name][length:]


def header_length(files: Files, draw: Random) -> None:
    name = draw.choice(_shards(files) or [""])
    if not isinstance(files.get(name), bytes):
        return
    length = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, 100 << 20, len(files[name])])
    files[name] = struct.pack("<Q", length) + files[name][8:]


def header_bomb(files: Files, draw: Random) -> None:
    name = draw.choice(_shards(files) or [""])
    if not isinstance(files.get(name), bytes):
        return
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    many = ",".join(f'"{i}":{empty}' for i in range(draw.choice([100, 20_000])))
    huge = f'"x":{{"dtype":"F64","shape":[{2**32},{2**32}],"data_offsets":[0,{2**63}]}}'
    text = draw.choice([f"{{{many}}}", f"{{{huge}}}", "[" * 100_000, '{"x":' * 1000]).encode()
    files[name] = struct.pack("<Q", len(text)) + text + files[name][-100:]


MUTATIONS: list[Callable[[Files, Random], None]] = [
    *(flip_bits, overwrite, truncate, extend, cut_or_repeat),
    *(remove, swap, duplicate, rename, link, folder),
    *(edit_manifest, edit_manifest, edit_index, edit_carried, declare, declare, bomb),
    *(edit_header, edit_header, header_length, header_bomb),
]


def _any(files: Files, draw: Random) -> tuple[str, bytes]:
    """An entry and its content, empty where it is no file."""
    name = draw.choice(sorted(files) or [MANIFEST])
    content = files.get(name, b"")
    return name, content if isinstance(content, bytes) else b""


def _shards(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def _parsed(content: Any) -> Any:
    try:
        return json.loads(content) if isinstance(content, bytes) else None
    except (ValueError, RecursionError):
        return None


def _header(content: Any) -> dict[str, Any]:
    if not isinstance(content, bytes):
        return {}
    header = _parsed(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header if isinstance(header, dict) else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _edit_file(files: Files, name: str, draw: Random) -> None:
    document = _parsed(files.get(name))
    if not isinstance(document, dict | list):
        return
    for _ in range(draw.choice([1, 1, 2, 5])):
        _edit(document, draw)
    text = json.dumps(document)
    if draw.random() < 0.1:  # a key twice
        text = text.replace('"shape":', '"shape": [1], "shape":', 1)
    files[name] = text.encode()


def _edit(document: Any, draw: Random) -> None:
    """Changes one value, key or element somewhere inside."""
    inner: list[Any] = [document]
    for container in inner:  # grows while it is read
        values = container.values() if isinstance(container, dict) else container
        inner += [value for value in values if isinstance(value, dict | list)]
    container = draw.choice(inner)
    keys = sorted(container) if isinstance(container, dict) else list(range(len(container)))
    if not keys:
        return
    key = draw.choice(keys)
    # Copies: otherwise a document could contain itself, and later mutants depend on earlier ones.
    value, odd = copy.deepcopy(container[key]), copy.deepcopy(draw.choice(ODD))
    match draw.randrange(6):
        case 0:
            container[key] = odd
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[draw.choice([*keys, "x", "", "\ud800", "a.exact"])] = container.pop(key)
        case 3 if isinstance(container, list):
            container.insert(draw.choice(keys), draw.choice([value, odd]))
        case 4 if type(value) is int:
            container[key] = draw.choice([value + 1, value - 1, 2 * value, -value, value << 33])
        case _:
            container[key] = copy.deepcopy(container[draw.choice(keys)])
