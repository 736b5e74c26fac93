"""Reading dense checkpoints, their refusals, fingerprints, and pairing."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltacome.arch.checkpoint import Checkpoint, check_finite, full_digest, sample_digest
from deltacome.arch.pairing import pair_tensors
from deltacome.errors import CheckpointError, MismatchError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def single(folder, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def sharded(folder):
    folder.mkdir()
    weight_map = {}
    for number, name in enumerate(["a", "b", "c"], 1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({name: draw(4, 5, seed=number)}, folder / shard)
        weight_map[name] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_as_one(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path / "m"))
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["b"].shape == (4, 5)
    assert torch.equal(checkpoint.read("b"), draw(4, 5, seed=2))
    assert checkpoint.nbytes() == sum(
        f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors")
    )


def test_a_single_file_counts_where_an_index_is_left_over(tmp_path):
    """As in transformers, whose passes would otherwise be those of another model."""
    folder = sharded(tmp_path / "m")
    assert list(single(folder, a=torch.ones(3)).tensors) == ["a"]
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert torch.equal(Checkpoint(folder).read("a"), torch.ones(3))


def test_a_revision_is_the_commit_that_was_read(tmp_path, hub):
    folder = single(tmp_path / "m", w=torch.ones(3)).path
    assert Checkpoint(folder, "v1").revision is None  # a folder has none
    commit = hub.publish("org/base", folder)
    for name in ("org/base", "org/base@main", f"org/base@{commit}"):
        checkpoint = Checkpoint(name)
        assert (checkpoint.name_or_path, checkpoint.revision) == ("org/base", commit)


def test_what_is_read_is_a_copy(tmp_path):
    checkpoint = single(tmp_path / "m", a=torch.ones(3))
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(3))


def test_an_unknown_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor named z"):
        single(tmp_path / "m", a=torch.ones(3)).read("z")


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.* missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    folder = sharded(tmp_path / "m")
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: truncated"):
        Checkpoint(folder)


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path / "m"))
    file = tmp_path / "m" / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.safetensors: c cannot be read"):
        checkpoint.read("c")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "expected an index"),
        ("{}", "expected an index"),
        ('{"weight_map": 3}', "expected an index"),
        ('{"weight_map": {"a": 5}}', "expected an index"),
        ('{"weight_map": {"a": null, "b": "x"}}', "expected an index"),
        ('{"weight_map": {"a": "../m/model-00001-of-00003.safetensors"}}', "missing"),
        ('{"weight_map": {"b": "model-00001-of-00003.safetensors"}}', "b: expected in .*, found"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, index, reason):
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(folder)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"only pickled weights.*save_pretrained"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "~/none"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(CheckpointError, match="expected a folder, or org/name"):
        Checkpoint(name)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a folder"):
        Checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("text", [None, "{", "\xff"])
def test_a_configuration_that_is_none(tmp_path, text):
    checkpoint = single(tmp_path / "m", a=torch.ones(3))
    if text is not None:
        (tmp_path / "m" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = checkpoint.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_counted_and_placed(dtype, bad):
    tensor = draw(3, 4).to(dtype)
    check_finite("w", tensor, "base")
    tensor[1, 2] = tensor[2, 0] = bad
    with pytest.raises(CheckpointError, match=r"w of the base.*got 2 .*flat index 6"):
        check_finite("w", tensor, "base")


def test_integers_are_finite():
    check_finite("ids", torch.arange(3), "base")


# --- fingerprints --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (512,), (513,), (100, 100), (0, 4)])
def test_a_sample_does_not_change_with_a_wider_dtype(shape):
    narrow = draw(*shape).to(torch.bfloat16)
    assert sample_digest(narrow) == sample_digest(narrow.float()) == sample_digest(narrow.double())
    assert len(sample_digest(narrow)) == 16


def test_a_sample_of_a_rounded_base_is_that_of_the_base():
    wide = draw(200, 300)
    assert sample_digest(wide) == sample_digest(wide.to(torch.bfloat16))


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "int64", "uint8", "bool"]
)
def test_a_sample_of_a_file_is_that_of_its_tensor(tmp_path, dtype):
    shapes = {"none": (0, 4), "one": (1,), "all": (512,), "more": (9, 57), "many": (100, 100)}
    tensors = {name: (3 * draw(*shape)).to(getattr(torch, dtype)) for name, shape in shapes.items()}
    checkpoint = single(tmp_path / "m", **tensors)
    for name, tensor in tensors.items():
        assert checkpoint.sample(name) == sample_digest(tensor), name


def test_a_sample_of_a_file_cut_off_since_it_was_opened(tmp_path):
    checkpoint = single(tmp_path / "m", a=draw(100, 100))
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="a: expected 2048 bytes of sampled values, got 1948"):
        checkpoint.sample("a")


def test_a_sample_of_a_dtype_that_torch_lacks(tmp_path):
    checkpoint = single(tmp_path / "m", a=draw(4))
    checkpoint.tensors["a"] = replace(checkpoint.tensors["a"], dtype="unknown")
    with pytest.raises(CheckpointError, match="a: expected one of torch's dtypes, got another"):
        checkpoint.sample("a")


def test_a_sample_sees_shape_start_end_and_scale():
    w = draw(128, 128)
    first, last = w.clone(), w.clone()
    first[0, 0] += 1
    last[-1, -1] += 1
    digests = {sample_digest(x) for x in (w, w.view(64, 256), first, last, 2 * w, w + 0.01 * w)}
    assert len(digests) == 6


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_byte_changes_the_full_digest(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    w = (50 * draw(9, 31)).to(dtype)
    raw = w.clone().view(torch.uint8).view(-1)
    place = data.draw(st.integers(0, raw.numel() - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    changed = raw.view(dtype).view(w.shape)
    assert full_digest(changed) != full_digest(w)
    raw[:] = w.view(torch.uint8).view(-1)
    assert full_digest(raw.view(dtype).view(w.shape)) == full_digest(w)


def test_the_full_digest_knows_dtype_shape_and_not_strides():
    w = torch.zeros(6, 4)
    others = [w.view(4, 6), w.view(-1), w.to(torch.int32), w[:5], torch.zeros(0, 4), torch.zeros(0)]
    assert len({full_digest(x) for x in [w, *others]}) == 7
    x = draw(6, 4)
    assert full_digest(x.T.contiguous().T) == full_digest(x)
    assert full_digest(torch.tensor(1.0)) != full_digest(torch.ones(1))


# --- pairs ---------------------------------------------------------------------------------------


def pairs_of(tmp_path, base, tuned):
    return {
        pair.name: pair
        for pair in pair_tensors(
            single(tmp_path / "base", **base), single(tmp_path / "tuned", **tuned), HEAD, EMBEDDING
        )
    }


def test_added_rows_and_new_tensors(tmp_path):
    pairs = pairs_of(
        tmp_path,
        {EMBEDDING: draw(5, 4), "n": draw(4)},
        {EMBEDDING: draw(7, 4), "n": draw(4), "new": draw(2)},
    )
    assert (pairs[EMBEDDING].shape, pairs[EMBEDDING].base_shape) == ((7, 4), (5, 4))
    assert (pairs["new"].base_name, pairs["new"].base_shape) == (None, None)
    assert len(pairs) == 3


def test_a_head_that_only_the_tuned_model_stores_comes_from_the_embedding(tmp_path):
    pairs = pairs_of(tmp_path, {EMBEDDING: draw(5, 4)}, {EMBEDDING: draw(5, 4), HEAD: draw(5, 4)})
    assert pairs[HEAD].base_name == EMBEDDING


def test_a_head_that_only_the_base_stores_is_not_missed(tmp_path):
    pairs = pairs_of(tmp_path, {EMBEDDING: draw(5, 4), HEAD: draw(5, 4)}, {EMBEDDING: draw(5, 4)})
    assert list(pairs) == [EMBEDDING]


@pytest.mark.parametrize("shape", [(5, 3), (5,), (5, 4, 1)])
def test_another_shape_is_another_base(tmp_path, shape):
    with pytest.raises(MismatchError, match=r"^w: the base has shape \(5, 4\)"):
        pairs_of(tmp_path, {"w": draw(5, 4)}, {"w": draw(*shape)})


def test_a_tensor_of_the_base_must_not_be_missing(tmp_path):
    with pytest.raises(MismatchError, match="1 tensors of the base are missing, the first is n"):
        pairs_of(tmp_path, {"n": draw(4), "w": draw(4)}, {"w": draw(4)})
