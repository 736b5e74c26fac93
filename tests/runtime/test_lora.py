"""A delta as a LoRA adapter, with which PEFT computes what the merged model computes."""

import dataclasses
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from artifact_helpers import PLAN, random_artifact, random_packed, write_artifact
from runtime_helpers import assert_close, load, logits, some_ids
from safetensors.torch import load_file

from deltacome.arch.checkpoint import Checkpoint, full_digest, sample_digest
from deltacome.errors import OutputError, PlanError, UnsupportedError
from deltacome.format.manifest import Record
from deltacome.format.tensors import dtype_name
from deltacome.runtime import export_lora, merge
from deltacome.runtime.lora import _error, _factors

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
import families
from tiny_pairs import rewrite, weights_of

from deltacome import compress


def peft_logits(base, adapter, ids):
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    model.eval()
    return logits(model, ids)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma3"])
def test_peft_computes_the_merged_model(bases, tmp_path, family):
    base = bases[family]
    artifact = random_artifact(base, tmp_path / "delta")
    said = export_lora(artifact, tmp_path / "lora", dtype=torch.float32)
    merged = load(merge(base, artifact, tmp_path / "merged"))
    assert_close(peft_logits(base, said.path, some_ids()), logits(merged, some_ids()), 1e-4)
    assert said.left_out == []
    assert max(said.errors.values()) < 1e-10
    assert set(said.ranks.values()) == {10}  # the plan's rank
    stored = load_file(said.path / "adapter_model.safetensors")
    assert said.nbytes == sum(tensor.nbytes for tensor in stored.values())
    biases = {name for name in said.saved if name.endswith("bias")}
    assert len(biases) == (6 if family == "qwen2" else 0)
    assert all("norm" in name for name in set(said.saved) - biases)


def test_sixteen_bits(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    said = export_lora(artifact, tmp_path / "lora")
    assert 0 < max(said.errors.values()) < 1e-6
    assert (
        load_file(said.path / "adapter_model.safetensors")[
            "base_model.model.lm_head.lora_A.weight"
        ].dtype
        == torch.float16
    )
    merged = load(merge(bases["llama"], artifact, tmp_path / "merged"))
    got, wanted = peft_logits(bases["llama"], said.path, some_ids()), logits(merged, some_ids())
    assert_close(got, wanted, 5e-3)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_smaller_rank_keeps_the_best_of_the_delta(bases, tmp_path, rank):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    said = export_lora(artifact, tmp_path / "lora", rank=rank)
    assert set(said.ranks.values()) == {rank}
    for name, record in artifact.manifest.records.items():
        if record.plan:
            s = torch.linalg.svdvals(artifact.packed(name).dense().double())
            best = float(s[rank:].square().sum() / s.square().sum())
            rounding = 2e-7  # to 16 bits
            got = said.errors[name.removesuffix(".weight")]
            assert got == pytest.approx(best, rel=1e-3, abs=rounding)
    config = json.loads((said.path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert peft_logits(bases["llama"], said.path, some_ids()).isfinite().all()


def test_signs_need_a_rank(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", terms="mixed")
    with pytest.raises(UnsupportedError, match="signs are of full rank: say how many"):
        export_lora(artifact, tmp_path / "lora")
    said = export_lora(artifact, tmp_path / "lora", rank=8)
    signs = [name for name, r in artifact.manifest.records.items() if r.sign_scales]
    assert len(signs) > 4
    for name in signs:
        s = torch.linalg.svdvals(artifact.packed(name).dense().double())
        best = float(s[8:].square().sum() / s.square().sum())
        assert said.errors[name.removesuffix(".weight")] == pytest.approx(best, rel=1e-3)


def test_a_delta_of_nothing_has_no_error():
    packed = random_packed((64, 64), "one", None, 64, 0)
    assert packed.signs is not None
    packed.signs.scale.zero_()
    assert _error(packed, *_factors(packed, 2)) == 0.0  # not nan


def test_lora_only_says_what_it_leaves_out(bases, tmp_path):
    artifact = random_artifact(bases["qwen2"], tmp_path / "delta")
    said = export_lora(artifact, tmp_path / "lora", lora_only=True)
    exact = {name for name, r in artifact.manifest.records.items() if r.kind == "exact"}
    assert set(said.left_out) == exact != set()
    assert said.saved == []
    config = json.loads((said.path / "adapter_config.json").read_text())
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    keys = load_file(said.path / "adapter_model.safetensors").keys()
    assert all("lora_" in key for key in keys)
    assert all(name in (said.path / "README.md").read_text() for name in exact)


def test_ranks_that_differ(bases, tmp_path):
    same = ("model.layers.0.mlp.up_proj.weight",)
    artifact = random_artifact(bases["llama"], tmp_path / "delta", same=same)
    said = export_lora(artifact, tmp_path / "lora")
    assert "model.layers.0.mlp.up_proj" not in said.ranks
    packed = artifact.packed("model.layers.0.mlp.down_proj.weight")
    b_OR, a_RI = _factors(packed, None)
    torch.testing.assert_close(b_OR @ a_RI, packed.dense(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(b_OR.square().mean(0), a_RI.square().mean(1))


def test_a_family_with_transposed_weights(tmp_path):
    base, tuned = families.make_pair("GPT2LMHeadModel", tmp_path)
    artifact = compress(base, tuned, tmp_path / "delta", ratio=3.7, calibration="none")
    said = export_lora(artifact, tmp_path / "lora", dtype=torch.float32)
    ranks = set(said.ranks.values())
    assert len(ranks) > 1  # so that the rank patterns matter
    assert len(set(said.saved)) == len(said.saved)
    merged = families.load(merge(base, artifact, tmp_path / "merged"))
    model = peft.PeftModel.from_pretrained(families.load(base), said.path).eval()
    assert_close(families.logits(model.base_model.model), families.logits(merged), 1e-4)


def test_the_base_is_read_at_its_revision(hub, tmp_path):
    base, tuned = families.make_pair("GPT2LMHeadModel", tmp_path)
    bias = "transformer.h.0.ln_1.bias"  # unchanged beside a changed weight: the base has to be read
    weights = weights_of(base)
    rewrite(tuned, weights_of(tuned) | {bias: weights[bias]}, None)
    hub.publish("org/base", base)
    artifact = compress("org/base", tuned, tmp_path / "delta", ratio=3.7, calibration="none")
    rewrite(base, weights | {bias: weights[bias] + 1}, None)
    hub.publish("org/base", base)
    said = export_lora(artifact, tmp_path / "lora")
    assert "transformer.h.0.ln_1" in said.saved


def test_what_no_adapter_holds(bases, tmp_path):
    grown = random_artifact(bases["llama"], tmp_path / "grown", vocab=140)
    with pytest.raises(UnsupportedError, match="added rows, which no LoRA adapter holds"):
        export_lora(grown, tmp_path / "lora")
    with pytest.raises(PlanError, match="rank: expected at least 1"):
        export_lora(grown, tmp_path / "lora", rank=0)
    assert {file.name for file in tmp_path.iterdir()} == {"grown"}


def test_an_output_that_exists(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    with pytest.raises(OutputError, match="exists already"):
        export_lora(artifact, tmp_path / "delta")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlavaForConditionalGeneration"])
def test_a_module_with_its_own_tensor_and_others_below_is_refused(tmp_path, name):
    """PEFT would take the modules below one that is saved whole from the base, without their LoRAs."""
    base, tuned = families.make_pair(name, tmp_path)
    ratio = families.RATIOS.get(name, 3)
    artifact = compress(base, tuned, tmp_path / "delta", ratio=ratio, calibration="none")
    with pytest.raises(UnsupportedError, match=r"holds other modules.*--to dense"):
        export_lora(artifact, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    said = export_lora(artifact, tmp_path / "lora", lora_only=True)
    assert any(name.endswith(("bias", "class_embedding")) for name in said.left_out)


def test_a_head_that_the_tuned_model_alone_ties_is_refused(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", tie=True)
    with pytest.raises(
        UnsupportedError, match=r"ties its head to its embedding, the base does not"
    ):
        export_lora(artifact, tmp_path / "lora", base=bases["llama"])
    tied = random_artifact(bases["llama-tied"], tmp_path / "tied")
    with pytest.warns(UserWarning, match="could not check that the base does"):
        export_lora(tied, tmp_path / "lora", base=tmp_path / "gone")


def stored(base, output, exact, packed=None):
    """An artifact that stores one tensor exactly, perhaps another as bands, and changes nothing else."""
    records, entries = [], {}
    for name in base.tensors:
        tensor = base.read(name)
        shape = tuple(tensor.shape)
        of_base = name, shape, sample_digest(tensor), full_digest(tensor)
        record = Record(name, shape, dtype_name(tensor.dtype), *of_base)
        if name == exact:
            record = dataclasses.replace(record, exact_rows=(0, shape[0]))
            entries[f"{name}.exact"] = 1.5 * tensor
        if name == packed:
            record = dataclasses.replace(record, plan=PLAN)
            entries[f"{name}.bands"] = random_packed(shape, ("bands",), PLAN, 32, 0).blobs()[
                "bands"
            ]
        records.append(record)
    return write_artifact(output, records, entries, config=base.config)


def test_a_linear_without_a_bias_that_is_stored_exactly(bases, tmp_path):
    base = Checkpoint(bases["llama"])
    exact, packed = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
    artifact = stored(base, tmp_path / "delta", exact, packed)
    said = export_lora(artifact, tmp_path / "lora", dtype=torch.float32)
    assert said.saved == ["model.layers.0.mlp.up_proj"]
    merged = load(merge(base.path, artifact, tmp_path / "merged"))
    assert_close(peft_logits(base.path, said.path, some_ids()), logits(merged, some_ids()), 1e-4)


def test_a_delta_without_a_matrix_is_refused(bases, tmp_path):
    """PEFT would not load its adapter: it has nothing to put one on."""
    artifact = stored(Checkpoint(bases["llama"]), tmp_path / "delta", "model.norm.weight")
    for lora_only in (False, True):
        with pytest.raises(UnsupportedError, match="no matrix with bands or signs"):
            export_lora(artifact, tmp_path / "lora", lora_only=lora_only)
    assert not (tmp_path / "lora").exists()
