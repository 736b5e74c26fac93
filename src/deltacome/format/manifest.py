"""`delta_config.json`: what an artifact says about itself, read strictly.

The manifest comes from outside, so every field is checked for type and range before anything uses
it, and its statements must be consistent: a record names a plan, and the plan gives the bytes
(`spec`). Unknown keys are refused within a known schema version; a newer schema is refused as such.
It is written as one line of JSON with a fixed key order: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from deltacome.errors import ArtifactError
from deltacome.format.fields import (
    Fields,
    choice,
    integer,
    is_text,
    mapping,
    number,
    optional,
    parse_json,
    string,
    strings,
    true,
)
from deltacome.format.spec import GROUP, Band, Plan, bands_nbytes, codes_nbytes, rank, signs_nbytes
from deltacome.format.tensors import DTYPES, entry_nbytes

SCHEMA = 1
MANIFEST_FILE = "delta_config.json"
MAX_DIM = 1 << 40
SHARD_NAME = re.compile(r"delta-[0-9]{5}-of-[0-9]{5}\.safetensors")
MAX_CARRIED_BYTES = 256 << 20
CARRIED_NAME = re.compile(
    r"(?!config\.|adapter_|delta|model)\w[\w.-]{0,99}\.(json|jinja|txt|model|tiktoken)", re.ASCII
)
"""Names of files that may be carried along with the weights: data in the folder itself, and nothing
that a loader would take for a model, an adapter or code."""


@dataclass(frozen=True)
class Record:
    """What the artifact holds of one tensor of the tuned checkpoint.

    For rows that base and tuned have in common, the tuned value is base + signs + bands; for
    `exact_rows` it is stored as it is; with none of these, the tensor is the same as the base's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base_name: str | None
    """The base's tensor that the delta is taken against; None where the base has none."""
    base_shape: tuple[int, ...] | None
    base_sample: str | None
    """Fingerprint of sampled values of the base's tensor (`arch.checkpoint.sample_digest`)."""
    base_digest: str | None
    """Fingerprint of all bytes of the base's tensor (`arch.checkpoint.full_digest`)."""
    plan: Plan = ()
    sign_scales: int | None = None
    """Number of scales of the signs term: 1, or one per row that it covers; None without the term."""
    exact_rows: tuple[int, int] | None = None
    """Rows stored as their tuned value, [start, stop); (0, 1) for a 0-dimensional tensor."""
    error: float | None = None
    """Relative error of the delta, `‖(D − D̂)X‖² / ‖DX‖²` (X: calibration inputs, or identity)."""
    transposed: bool = False
    """Whether the packed terms are those of the transposed matrix: the tensor is (in, out)."""

    @property
    def kind(self) -> str:
        """How most of the tensor is held: `bands`, `signs`, `signs+bands`, `exact` or `same`."""
        packed = [*(["signs"] if self.sign_scales else []), *(["bands"] if self.plan else [])]
        return "+".join(packed) or ("exact" if self.exact_rows else "same")

    @property
    def held(self) -> str:
        """`kind` as people see it: `dropped` where the tensor changed and its plan left it out."""
        return "dropped" if self.kind == "same" and self.error is not None else self.kind

    @property
    def packed(self) -> bool:
        """Whether there is a term of codes: bands, signs or both."""
        return bool(self.plan or self.sign_scales)

    @property
    def replaced(self) -> bool:
        """Whether every row is stored as its tuned value, so that the base's rows do not matter."""
        return self.exact_rows is not None and self.exact_rows[0] == 0

    @property
    def grown(self) -> bool:
        """Whether the tuned value is the base's rows, with or without a delta, followed by more rows."""
        return self.exact_rows is not None and not self.replaced

    @property
    def bands_shape(self) -> tuple[int, int]:
        """(out, in) of what bands and signs cover: the rows that base and tuned have in common."""
        assert self.base_shape is not None
        rows = min(self.shape[0], self.base_shape[0])
        return (self.shape[1], rows) if self.transposed else (rows, self.shape[1])

    @property
    def exact_shape(self) -> tuple[int, ...]:
        """Shape of the part that is stored as it is."""
        assert self.exact_rows is not None
        start, stop = self.exact_rows
        return (stop - start, *self.shape[1:]) if self.shape else ()

    def packed_nbytes(self, group: int = GROUP) -> dict[str, int]:
        """Bytes of the blob of each packed term, by its kind: `bands`, `signs`."""
        nbytes = {}
        if self.plan:
            nbytes["bands"] = bands_nbytes(self.bands_shape, self.plan, group)
        if self.sign_scales:
            nbytes["signs"] = signs_nbytes(self.bands_shape, self.sign_scales)
        return nbytes

    def entries(self, group: int = GROUP) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors entries that hold this tensor: key → (dtype, shape)."""
        entries: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{self.name}.{kind}": ("uint8", (nbytes,))
            for kind, nbytes in self.packed_nbytes(group).items()
        }
        if self.exact_rows:
            entries[f"{self.name}.exact"] = (self.dtype, self.exact_shape)
        return entries

    def nbytes(self, group: int = GROUP) -> int:
        """Bytes of the stored terms, without headers and the manifest."""
        return sum(entry_nbytes(*entry) for entry in self.entries(group).values())

    def codes_nbytes(self) -> float:
        """Bytes of the codes alone, as papers count them."""
        if not self.packed:
            return 0.0
        signs = math.prod(self.bands_shape) / 8 if self.sign_scales else 0.0
        return codes_nbytes(self.bands_shape, self.plan) + signs

    def tuned_nbytes(self) -> int:
        """Bytes of the tuned tensor as if at 16 bit."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True)
class FileInfo:
    """A file of the artifact."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All of `delta_config.json`."""

    base_name_or_path: str
    base_revision: str | None
    method: dict[str, Any]
    """`{"name": …, **options}`."""
    provenance: dict[str, Any]
    """Calibration source and seed, library versions."""
    records: dict[str, Record]
    files: dict[str, FileInfo] = field(default_factory=dict)
    """Files of the tuned model that are carried along: configuration, tokenizer and so on."""
    dropped_files: tuple[str, ...] = ()
    """Such files that the base has and the tuned model lacks: not to be taken over from the base."""
    shards: dict[str, FileInfo] = field(default_factory=dict)
    group_size: int = GROUP

    @property
    def base_source(self) -> str:
        """The base as it was read: a folder, or `org/name@revision` on the Hub."""
        revision = "" if self.base_revision is None else f"@{self.base_revision}"
        return self.base_name_or_path + revision

    def tuned_nbytes(self) -> int:
        """Bytes of the tuned model's weights as if at 16 bit."""
        return sum(record.tuned_nbytes() for record in self.records.values())

    def nominal_ratio(self) -> float | None:
        """16-bit bytes ÷ bytes of codes, over the tensors held as codes: the ratio of papers."""
        packed = [record for record in self.records.values() if record.packed]
        if not packed:
            return None
        covered = sum(2 * math.prod(record.bands_shape) for record in packed)
        return covered / sum(record.codes_nbytes() for record in packed)

    def to_json(self) -> str:
        """The text of the file, one line."""
        document = {
            "schema": SCHEMA,
            "base": {"name_or_path": self.base_name_or_path, "revision": self.base_revision},
            "method": self.method,
            "group_size": self.group_size,
            "provenance": self.provenance,
            "files": _files_to_json(self.files),
            "shards": _files_to_json(self.shards),
            "tensors": {name: record_to_json(r) for name, r in sorted(self.records.items())},
        }
        if self.dropped_files:
            document["dropped_files"] = list(self.dropped_files)
        return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks the text of a manifest.

        Raises:
            ArtifactError: not JSON, a newer schema, a missing or unknown field, a value of the
                wrong type or out of range; the message names the field.
        """
        document = Fields(parse_json(text, MANIFEST_FILE), f"{MANIFEST_FILE}: the document")
        schema = document.take("schema", integer(1, MAX_DIM))
        if schema != SCHEMA:
            raise ArtifactError(
                f"{MANIFEST_FILE}: schema: expected {SCHEMA}, got {schema}; "
                "a newer deltacome wrote this artifact, upgrade to read it"
            )
        base = Fields(document.take("base", mapping), f"{MANIFEST_FILE}: base")
        manifest = cls(
            base_name_or_path=base.take("name_or_path", string),
            base_revision=base.take("revision", optional(string)),
            method=document.take("method", mapping),
            group_size=document.take("group_size", integer(1, 1 << 20)),
            provenance=document.take("provenance", mapping),
            files=_files(document, "files", CARRIED_NAME, MAX_CARRIED_BYTES),
            dropped_files=document.take("dropped_files", strings, default=()),
            shards=_files(document, "shards", SHARD_NAME, 1 << 50),
            records={
                name: record_from_json(name, value)
                for name, value in document.take("tensors", mapping).items()
            },
        )
        Fields(manifest.method, f"{MANIFEST_FILE}: method").take("name", string)
        base.end()
        document.end()
        return manifest


def record_to_json(record: Record) -> dict[str, Any]:
    """A record as JSON; fields that say nothing are left out (the manifest's bytes count too)."""
    value: dict[str, Any] = {
        "kind": record.kind,
        "shape": list(record.shape),
        "dtype": record.dtype,
    }
    if record.base_name is not None and record.base_name != record.name:
        value["base_name"] = record.base_name
    if record.base_shape is not None and record.base_shape != record.shape:
        value["base_shape"] = list(record.base_shape)
    if record.base_name is not None:
        value["base_sample"] = record.base_sample
        value["base_digest"] = record.base_digest
    if record.plan:
        value["plan"] = [[band.bits, band.count] for band in record.plan]
    if record.transposed and record.packed:
        value["transposed"] = True
    if record.sign_scales:
        value["sign_scales"] = record.sign_scales
    if record.exact_rows:
        value["exact_rows"] = list(record.exact_rows)
    if record.error is not None:
        value["error"] = float(f"{record.error:.4g}")
    return value


def record_from_json(name: str, value: Any) -> Record:
    """Inverse of `record_to_json`.

    Raises:
        ArtifactError: the value is not a consistent record.
    """
    where = f"{MANIFEST_FILE}: tensors[{name!r:.200}]"
    fields = Fields(value, where)
    if name == "__metadata__" or not is_text(name):
        raise ArtifactError(f"{where}: no tensor of a safetensors file has this name")
    kind, shape = fields.take("kind", string), fields.take("shape", _shape)
    has_base = "base_digest" in fields
    record = Record(
        name=name,
        shape=shape,
        dtype=fields.take("dtype", choice(DTYPES)),
        base_name=fields.take("base_name", string, default=name) if has_base else None,
        base_shape=fields.take("base_shape", _shape, default=shape) if has_base else None,
        base_sample=fields.take("base_sample", string) if has_base else None,
        base_digest=fields.take("base_digest", string) if has_base else None,
        plan=fields.take("plan", _plan, default=()),
        sign_scales=fields.take("sign_scales", integer(1, MAX_DIM), default=None),
        exact_rows=fields.take("exact_rows", _rows, default=None),
        error=fields.take("error", number, default=None),
        transposed=fields.take("transposed", true, default=False),
    )
    fields.end()
    _check_record(record, kind, where)
    return record


def _check_record(record: Record, kind: str, where: str) -> None:
    """Refuses an inconsistent record: every row of the tensor must be accounted for exactly once."""

    def refuse(expected: str, got: Any) -> None:
        raise ArtifactError(f"{where}: expected {expected}, got {got}")

    if kind != record.kind:
        refuse(f"kind {record.kind!r} (from its terms)", repr(kind))
    rows = record.shape[0] if record.shape else 1
    covered = 0
    if record.base_shape is not None and not record.replaced:
        scalar = bool(record.base_shape) != bool(record.shape)  # one of them has no rows
        if record.base_shape[1:] != record.shape[1:] or scalar:
            refuse(f"a base of row shape {record.shape[1:]}", record.base_shape)
        covered = min(rows, record.base_shape[0] if record.base_shape else 1)
    if record.packed:
        if len(record.shape) != 2 or record.base_shape is None:
            refuse("bands and signs only on a matrix that the base has too", record.shape)
        if not DTYPES[record.dtype].is_floating_point:
            refuse("bands and signs only on a matrix of floating-point numbers", record.dtype)
        if covered == 0 or record.shape[1] == 0:
            refuse("bands and signs only where they cover rows", f"{covered} rows")
        if record.transposed and covered < rows:
            refuse("transposed only where all rows are covered", f"{covered} of {rows}")
    elif record.transposed:
        refuse("transposed only with bands or signs", kind)
    if record.plan and rank(record.plan) > min(record.bands_shape):
        refuse(f"at most {min(record.bands_shape)} directions", rank(record.plan))
    if record.sign_scales and record.sign_scales not in (1, record.bands_shape[0]):
        refuse(f"1 or {record.bands_shape[0]} sign_scales", record.sign_scales)
    start, stop = record.exact_rows or (rows, rows)
    if not (start == covered and stop == rows) or (record.exact_rows and start == stop and rows):
        refuse(f"exact_rows [{covered}, {rows})", f"[{start}, {stop})")


def _shape(item: Any) -> tuple[int, ...]:
    if not isinstance(item, list) or len(item) > 8:
        raise TypeError("expected a list of at most 8 sizes")
    shape = tuple(integer(0, MAX_DIM)(size) for size in item)
    if math.prod(shape) > MAX_DIM:  # torch.Size.numel() would overflow on a hostile shape
        raise ValueError(f"expected at most {MAX_DIM} entries")
    return shape


def _rows(item: Any) -> tuple[int, int]:
    if not isinstance(item, list) or len(item) != 2:
        raise TypeError("expected [start, stop]")
    start, stop = (integer(0, MAX_DIM)(row) for row in item)
    return start, stop


def _plan(item: Any) -> Plan:
    if not isinstance(item, list) or not 1 <= len(item) <= 64:
        raise TypeError("expected a list of 1 to 64 bands")
    bands = []
    for band in item:
        if not isinstance(band, list) or len(band) != 2:
            raise TypeError("expected bands [bits, count]")
        bands.append(Band(integer(1, 16)(band[0]), integer(1, MAX_DIM)(band[1])))
    return tuple(bands)


def _files(document: Fields, key: str, pattern: re.Pattern[str], limit: int) -> dict[str, FileInfo]:
    """Sizes and checksums by name; the pattern keeps a manifest from naming files elsewhere."""
    files = {}
    for name, item in document.take(key, mapping).items():
        where = f"{MANIFEST_FILE}: {key}[{name!r:.200}]"
        if not pattern.fullmatch(name):
            raise ArtifactError(f"{where}: expected a name like {pattern.pattern}")
        fields = Fields(item, where)
        files[name] = FileInfo(
            fields.take("bytes", integer(0, limit)), fields.take("sha256", string)
        )
        fields.end()
    return files


def _files_to_json(files: dict[str, FileInfo]) -> dict[str, Any]:
    return {name: {"bytes": f.nbytes, "sha256": f.sha256} for name, f in sorted(files.items())}
