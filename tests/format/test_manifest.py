"""The manifest comes from outside: everything that it may not say is refused, naming the field."""

import copy
import dataclasses
import json

import make_golden as golden
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltacome.errors import ArtifactError
from deltacome.format.artifact import Artifact
from deltacome.format.manifest import Manifest, Record, record_from_json, record_to_json
from deltacome.format.spec import WIDTHS, Band

DOCUMENT = json.loads((golden.GOLDEN / "delta_config.json").read_text())
ABSENT = object()


def changed(*path_and_value):
    """The golden manifest's text with one value changed, or absent."""
    *path, last, value = path_and_value
    document = copy.deepcopy(DOCUMENT)
    inner = document
    for key in path:
        inner = inner[key]
    if value is ABSENT:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(document)


def test_round_trip():
    text = (golden.GOLDEN / "delta_config.json").read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert manifest.records["head.weight"].base_name == "embed.weight"
    assert manifest.records["step"].base_name is None
    assert manifest.records["layer.weight"].plan == (Band(3, 1), Band(2, 1), Band(1, 1))


def test_where_the_base_is_read_from():
    manifest = Manifest.from_json(json.dumps(DOCUMENT))
    assert manifest.base_source == "some/base@main"
    assert dataclasses.replace(manifest, base_revision=None).base_source == "some/base"


def test_equal_manifests_have_equal_bytes_whatever_the_order():
    manifest = Manifest.from_json(json.dumps(DOCUMENT))
    backwards = dict(reversed(manifest.records.items()))
    assert dataclasses.replace(manifest, records=backwards).to_json() == manifest.to_json()


@given(
    shape=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    base_rows=st.integers(1, 50),
    bits=st.sampled_from(WIDTHS),
    signs=st.sampled_from([None, "one", "rows"]),
    error=st.none() | st.floats(0, 1e6),
)
def test_records_round_trip(shape, base_rows, bits, signs, error):
    exact_rows = (base_rows, shape[0]) if base_rows < shape[0] else None
    record = Record(
        *("w", shape, "bfloat16", "b", (base_rows, shape[1]), "0" * 16, "0" * 32),
        plan=(Band(bits, 1),),
        sign_scales={None: None, "one": 1, "rows": min(base_rows, shape[0])}[signs],
        exact_rows=exact_rows,
        error=error,
    )
    again = record_from_json("w", json.loads(json.dumps(record_to_json(record))))
    assert dataclasses.replace(again, error=None) == dataclasses.replace(record, error=None)
    assert (again.error is None) == (error is None)
    assert error is None or again.error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected an object, got list"),
        ("null", "expected an object, got NoneType"),
        ('{"schema":1,"schema":1}', "twice"),
        ('{"schema":1,"x":{"a":1,"a":2}}', "twice"),
        ('{"schema":1,"x":NaN}', "finite numbers, got NaN"),
        ('{"schema":1,"x":-Infinity}', "finite numbers, got -Infinity"),
        ('{"schema":1,"x":1e999}', "finite numbers, got 1e999"),
        ('{"schema":1' + "0" * 5000 + "}", "not valid JSON"),
        ("{}", "'schema' is missing"),
    ],
)
def test_not_the_json_of_a_manifest(text, message):
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(text)


def test_newer_schema_says_so():
    with pytest.raises(ArtifactError, match=r"schema: expected 1, got 2; a newer deltacome"):
        Manifest.from_json(changed("schema", 2))


def test_newer_schema_says_so_before_anything_else():
    with pytest.raises(ArtifactError, match="a newer deltacome"):
        Manifest.from_json('{"schema":7,"terms":"all new"}')


SHARD = "delta-00001-of-00001.safetensors"
LAYER = ("tensors", "layer.weight")
INFO = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("schema", 0), "schema"),
        (("schema", True), "schema"),
        (("schema", 1.0), "schema"),
        (("schema", "1"), "schema"),
        (("base", ABSENT), "'base' is missing"),
        (("base", "some/base"), "base: expected an object"),
        (("base", "name_or_path", None), "name_or_path: expected a string"),
        (("base", "revision", 3), "revision: expected a string"),
        (("base", "branch", "main"), r"base: unknown fields \['branch'\]"),
        (("method", "name", ABSENT), "'name' is missing"),
        (("method", []), "method: expected an object"),
        (("group_size", 0), "group_size: expected an integer"),
        (("group_size", 128.0), "group_size: expected an integer"),
        (("group_size", 1 << 21), "group_size: expected an integer"),
        (("comment", "hello"), r"unknown fields \['comment'\]"),
        (("shards", []), "shards: expected an object"),
        (("shards", SHARD, None), "expected an object, got None"),
        (("shards", SHARD, "bytes", -1), "bytes: expected an integer"),
        (("shards", SHARD, "bytes", "3590"), "bytes: expected an integer"),
        (("shards", SHARD, "sha256", ABSENT), "'sha256' is missing"),
        (("shards", SHARD, "md5", ""), r"unknown fields \['md5'\]"),
        (("tensors", None), "tensors: expected an object"),
        ((*LAYER, 5), r"layer\.weight.*expected an object"),
        ((*LAYER, "kind", ABSENT), "'kind' is missing"),
        ((*LAYER, "kind", "dense"), "expected kind 'bands'"),
        ((*LAYER, "kind", "same"), "expected kind 'bands'"),
        ((*LAYER, "shape", ABSENT), "'shape' is missing"),
        ((*LAYER, "shape", 7), "shape: expected a list"),
        ((*LAYER, "shape", [7, -70]), "shape: expected an integer"),
        ((*LAYER, "shape", [7.0, 70]), "shape: expected an integer"),
        ((*LAYER, "shape", [1] * 9), "shape: expected a list of at most 8"),
        ((*LAYER, "shape", [1 << 32, 1 << 32]), "shape: expected at most"),
        ((*LAYER, "shape", [1 << 40, 1 << 40]), "shape: expected at most"),
        ((*LAYER, "dtype", "complex64"), "dtype: expected one of"),
        ((*LAYER, "dtype", ["bfloat16"]), "dtype: expected one of"),
        ((*LAYER, "plan", []), "plan: expected a list of 1 to 64 bands"),
        ((*LAYER, "plan", [[2, 1]] * 65), "plan: expected a list of 1 to 64 bands"),
        ((*LAYER, "plan", [2, 1]), r"plan: expected bands \[bits, count\]"),
        ((*LAYER, "plan", [[5, 1]]), "plan: band width"),
        ((*LAYER, "plan", [[2, 0]]), "plan: expected an integer"),
        ((*LAYER, "plan", [[2, True]]), "plan: expected an integer"),
        ((*LAYER, "plan", [[2, 8]]), "at most 7 directions, got 8"),
        ((*LAYER, "plan", [[2, 4], [1, 4]]), "at most 7 directions, got 8"),
        ((*LAYER, "error", -0.5), "error: expected a finite number"),
        ((*LAYER, "error", "small"), "error: expected a finite number"),
        ((*LAYER, "error", True), "error: expected a finite number"),
        ((*LAYER, "error", 10**400), "error: .*too large.*, got 1000"),
        ((*LAYER, "note", 1), r"layer\.weight.*unknown fields \['note'\]"),
        ((*LAYER, "base_digest", ABSENT), r"unknown fields \['base_sample'\]"),
        ((*LAYER, "base_sample", ABSENT), "'base_sample' is missing"),
        ((*LAYER, "base_sample", 1), "base_sample: expected a string"),
        ((*LAYER, "base_shape", [7, 71]), "a base of row shape"),
        ((*LAYER, "base_shape", [7]), "a base of row shape"),
        ((*LAYER, "base_shape", []), "a base of row shape"),
        # Every row has exactly one account.
        ((*LAYER, "base_shape", [6, 70]), r"exact_rows \[6, 7\)"),
        ((*LAYER, "exact_rows", [6, 7]), r"exact_rows \[7, 7\)"),
        ((*LAYER, "exact_rows", [7, 8]), r"exact_rows \[7, 7\)"),
        ((*LAYER, "exact_rows", [7, 7]), r"exact_rows \[7, 7\)"),
        ((*LAYER, "exact_rows", [0, 7]), "only where they cover rows"),
        (("files", ABSENT), "'files' is missing"),
        (("files", []), "files: expected an object"),
        (("dropped_files", "chat_template.jinja"), "dropped_files: expected a list of strings"),
        (("dropped_files", [1]), "dropped_files: expected a string"),
        (
            ("files", "../tokenizer.json", INFO),
            r"files\['../tokenizer.json'\]: expected a name like",
        ),
        (("files", "modeling.py", INFO), "files.*expected a name like"),
        (("files", "config.json", INFO), "files.*expected a name like"),
        (("files", "model.safetensors.index.json", INFO), "files.*expected a name like"),
        (("files", "tokenizer.json", "0" * 64), r"files\['tokenizer.json'\]: expected an object"),
        (("files", "tokenizer.json", INFO | {"bytes": 1 << 40}), "bytes: expected an integer"),
        (("base", "name_or_path", "\ud800"), "name_or_path: expected a string"),
        (("tensors", "\ud800", {}), "no tensor of a safetensors file has this name"),
        (("tensors", "__metadata__", {}), "no tensor of a safetensors file has this name"),
        (("tensors", "embed.weight", "exact_rows", ABSENT), r"exact_rows \[7, 9\)"),
        (("tensors", "embed.weight", "exact_rows", [8, 9]), r"exact_rows \[7, 9\)"),
        (("tensors", "embed.weight", "exact_rows", [7, 8]), r"exact_rows \[7, 9\)"),
        (("tensors", "embed.weight", "exact_rows", [9, 7]), r"exact_rows \[7, 9\)"),
        (("tensors", "embed.weight", "exact_rows", [7]), r"exact_rows: expected \[start, stop\]"),
        (("tensors", "embed.weight", "exact_rows", [-1, 9]), "exact_rows: expected an integer"),
        (("tensors", "norm.weight", "exact_rows", [0, 2]), r"exact_rows \[0, 3\)"),
        (("tensors", "norm.weight", "plan", [[2, 1]]), "expected kind 'bands'"),
        # Signs cover what bands cover, with one scale or one for each row.
        ((*LAYER, "sign_scales", 1), "expected kind 'signs\\+bands'"),
        ((*LAYER, "sign_scales", 0), "sign_scales: expected an integer"),
        ((*LAYER, "sign_scales", True), "sign_scales: expected an integer"),
        ((*LAYER, "sign_scales", [1]), "sign_scales: expected an integer"),
        ((*LAYER, "sign_scales", 1 << 41), "sign_scales: expected an integer"),
        (("tensors", "norm.weight", "sign_scales", 1), "expected kind 'signs'"),
        (("tensors", "step", "exact_rows", ABSENT), "expected kind 'same'"),
        (("tensors", "step", "exact_rows", [0, 2]), r"exact_rows \[0, 1\)"),
        (("tensors", "still.weight", "kind", "exact"), "expected kind 'same'"),
        ((*LAYER, "dtype", "int64"), "a matrix of floating-point numbers"),
        ((*LAYER, "dtype", "bool"), "a matrix of floating-point numbers"),
    ],
)
def test_what_a_manifest_may_not_say(change, message):
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(changed(*change))


def test_bands_need_a_matrix_with_a_base():
    value = {"kind": "bands", "shape": [4, 4], "dtype": "float32", "plan": [[2, 1]]}
    with pytest.raises(ArtifactError, match="a matrix that the base has"):
        record_from_json("w", value)
    value |= {"shape": [2, 2, 2], "base_sample": "", "base_digest": ""}
    with pytest.raises(ArtifactError, match="a matrix that the base has"):
        record_from_json("w", value)


SIGNS = {
    "kind": "signs",
    "shape": [4, 6],
    "dtype": "float32",
    "base_sample": "",
    "base_digest": "",
    "sign_scales": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign_scales": 2}, "1 or 4 sign_scales, got 2"),
        ({"sign_scales": 6}, "1 or 4 sign_scales, got 6"),
        ({"plan": [[2, 1]]}, r"expected kind 'signs\+bands'"),
        ({"kind": "bands"}, "expected kind 'signs'"),
        ({"shape": [4, 2, 3]}, "a matrix that the base has"),
        ({"shape": [4, 0]}, "where they cover rows"),
        ({"shape": [0, 6]}, "where they cover rows"),
        ({"exact_rows": [0, 4]}, "where they cover rows"),
        # A grown vocabulary: the scales are those of the rows that both have.
        ({"base_shape": [3, 6], "exact_rows": [3, 4], "sign_scales": 4}, "1 or 3 sign_scales"),
        ({"base_shape": [5, 6], "sign_scales": 5}, "1 or 4 sign_scales"),
        # Rows of a transposed matrix are inputs, to which none can be added.
        (
            {"transposed": True, "base_shape": [3, 6], "exact_rows": [3, 4]},
            "where all rows are covered, got 3 of 4",
        ),
    ],
)
def test_what_signs_may_not_be(change, message):
    assert record_from_json("w", SIGNS).sign_scales == 1
    with pytest.raises(ArtifactError, match=message):
        record_from_json("w", SIGNS | change)


def test_signs_need_a_base():
    value = {"kind": "signs", "shape": [4, 4], "dtype": "float32", "sign_scales": 1}
    with pytest.raises(ArtifactError, match="a matrix that the base has"):
        record_from_json("w", value)


def test_a_number_is_not_taken_from_a_vector():
    value = {"kind": "same", "shape": [], "dtype": "float32", "base_sample": "", "base_digest": ""}
    assert record_from_json("w", value).base_shape == ()
    with pytest.raises(ArtifactError, match=r"a base of row shape \(\), got \(5,\)"):
        record_from_json("w", value | {"base_shape": [5]})


def test_unaccounted_new_tensor():
    with pytest.raises(ArtifactError, match=r"expected exact_rows \[0, 4\)"):
        record_from_json("w", {"kind": "same", "shape": [4, 4], "dtype": "float32"})


@pytest.mark.parametrize(("shape", "base"), [([1], []), ([], [1])])
def test_a_scalar_is_no_vector(shape, base):
    """Indexing the one like the other would fail when it is merged."""
    value = {"kind": "same", "shape": shape, "dtype": "float32", "base_shape": base}
    with pytest.raises(ArtifactError, match="a base of row shape"):
        record_from_json("w", value | {"base_sample": "", "base_digest": ""})


def test_every_field_says_what_it_counts():
    manifest = Artifact.open(golden.GOLDEN).manifest
    assert manifest.tuned_nbytes() == 2 * (9 * 70 + 9 * 70 + 7 * 70 + 3 + 1 + 2 * 300)
    bits = 16 + 8 + 4 + 3 + 2 + 1, 3 + 2 + 1
    covered = 2 * 3 * 7 * 70
    assert manifest.nominal_ratio() == pytest.approx(covered / ((2 * bits[0] + bits[1]) * 77 / 8))
    record = manifest.records["embed.weight"]
    assert record.nbytes(manifest.group_size) == sum(
        (2 * 70 * 2, record.entries(manifest.group_size)["embed.weight.bands"][1][0])
    )
    assert record.bands_shape == (7, 70)
    assert not record.replaced
    assert manifest.records["norm.weight"].replaced
    assert dataclasses.replace(manifest, records={}).nominal_ratio() is None
    signs = Artifact.open(golden.FOLDER / "signs").manifest
    assert signs.records["rows.weight"].codes_nbytes() == 7 * 70 / 8
    assert signs.records["embed.weight"].codes_nbytes() == 7 * 70 / 8 + bits[1] * 77 / 8
    assert signs.records["one.weight"].nbytes() == 7 * 16 + 16
    assert signs.records["rows.weight"].nbytes() == 7 * 16 + 32
