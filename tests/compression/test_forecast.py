"""What is forecast before a run is what the run then gives."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, make_pair
from tiny_pairs import SIZES, copy_of, rewrite, weights_of

from deltacome import compress
from deltacome.compression.forecast import arithmetic, forecast, measure
from deltacome.errors import CalibrationError, CheckpointError, MismatchError, PlanError
from deltacome.outline import outline


def quick(pair, **options):
    return forecast(*pair, **{"probe": False} | options)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_bytes_are_those_of_the_artifact(pairs, family, tmp_path):
    said = quick(pairs[family], ratios=(6, 8, 1000))
    assert [size.ratio for size in said.sizes] == [6, 8, 1000]
    for size in said.sizes[:2]:
        out = tmp_path / str(size.ratio)
        artifact = compress(*pairs[family], out, ratio=size.ratio, calibration="none")
        assert artifact.bytes_on_disk() == pytest.approx(size.nbytes, rel=0.02)
        assert said.tuned_nbytes == artifact.manifest.tuned_nbytes()
        assert said.tensors == len(artifact.manifest.records)
        assert said.matrices == sum(bool(r.plan) for r in artifact.manifest.records.values())
        exact = [r for r in artifact.manifest.records.values() if r.exact_rows]
        assert sum(e.count for e in said.exact) == len(exact)
        assert sum(e.nbytes for e in said.exact) == sum(r.nbytes() for r in exact)
    assert said.sizes[2].nbytes is None
    assert {e.why for e in said.exact} == {"a vector: norm, bias"}


def test_a_ratio_below_what_all_directions_need(pairs, tmp_path):
    (size,) = quick(pairs["llama"], ratios=(2,)).sizes
    artifact = compress(*pairs["llama"], tmp_path / "a", ratio=2, calibration="none")
    assert artifact.ratio() > 3
    assert artifact.bytes_on_disk() == pytest.approx(size.nbytes, rel=0.02)


def test_a_base_that_stores_a_tied_head(pairs, tmp_path):
    base, tuned = pairs["llama-tied"]
    base = copy_of(base, tmp_path / "base")
    weights = weights_of(base)
    rewrite(base, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    artifact = compress(base, tuned, tmp_path / "a", ratio=8, calibration="none")
    assert quick((base, tuned)).tensors == len(artifact.manifest.records)


def test_the_largest_ratio_is_one(pairs, tmp_path):
    said = quick(pairs["small"])
    below, above = 0.97 * said.largest_ratio, 1.05 * said.largest_ratio
    compress(*pairs["small"], tmp_path / "a", ratio=below, calibration="none")
    with pytest.raises(PlanError, match="cannot be met"):
        compress(*pairs["small"], tmp_path / "b", ratio=above, calibration="none")


@pytest.mark.parametrize("name", FAMILIES)
def test_configurations_are_enough(name, tmp_path):
    base, tuned = make_pair(name, tmp_path)
    whole = quick((base, tuned), ratios=(3,))
    for folder in (base, tuned):
        (folder / "model.safetensors").unlink()
    if "Moe" in name or "Mixtral" in name:  # only a checkpoint separates their matrices
        with pytest.raises(CheckpointError, match=r"base: expected weight files.*experts.gate"):
            quick((base, tuned))
        return
    bare = quick((base, tuned), ratios=(3,))
    assert bare.tuned_nbytes == whole.tuned_nbytes
    assert (bare.tensors, bare.matrices) == (whole.tensors, whole.matrices)


def test_why_tensors_are_exact(tmp_path):
    base, tuned = make_pair("LlavaForConditionalGeneration", tmp_path)
    said = {e.why: e for e in quick((base, tuned)).exact}
    assert said["more than two dimensions"].first.endswith("patch_embedding.weight")
    assert set(said) == {"more than two dimensions", "a vector: norm, bias"}


def test_calibration_costs_memory_and_is_not_said_where_there_is_none(pairs, text, tmp_path):
    none = quick(pairs["llama"])
    read = quick(pairs["llama"], calibration=text, samples=2048)
    self = quick(pairs["llama"], calibration="self")
    assert none.calibration is None
    states = 4 * 2048 * 256 * SIZES["hidden_size"]  # in float32
    assert read.memory["blocks"] - none.memory["blocks"] == pytest.approx(2 * states, rel=0.1)
    assert set(self.memory) - set(read.memory) == {"calibration text (the tuned model writes it)"}
    encoder = make_pair("BertForMaskedLM", tmp_path)
    assert quick(encoder, calibration="self").calibration is None


def test_a_probe_takes_the_machine_s_measure(pairs, text):
    rates = measure(256)
    assert 1e6 < rates.survey < 1e12
    assert 1e6 < rates.compress < 1e14
    assert 1e7 < rates.multiply < 1e15
    said = forecast(*pairs["llama"], calibration=text)
    assert set(said.seconds) == {"survey", "blocks", "passes and grams"}
    assert all(0 < seconds < 600 for seconds in said.seconds.values())
    assert arithmetic((8192, 8192), 16) == pytest.approx(8 * arithmetic((4096, 4096), 16))


def test_seventy_billion_from_a_configuration(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = quick((tmp_path, tmp_path), ratios=(16,))
    assert said.tuned_nbytes == 137_953_296_384
    assert said.sizes[0].nbytes == pytest.approx(137_953_296_384 / 16, rel=1e-3)
    assert max(said.memory.values()) < 16 << 30
    assert said.disk == 2 * said.sizes[0].nbytes  # units, and the artifact that is made of them
    assert {info.dtype for info in outline(tmp_path).tensors.values()} == {"bfloat16"}


def test_what_is_refused(pairs, tmp_path):
    base, tuned = pairs["small"]
    with pytest.raises(PlanError, match="at least one ratio"):
        quick((base, tuned), ratios=())
    for ratio in (0, -1, float("nan")):
        with pytest.raises(PlanError, match="ratio: expected a number above 0, got"):
            quick((base, tuned), ratios=(4, ratio))
    with pytest.raises(CalibrationError, match=r"nofile\.txt: expected a .* file, found none"):
        quick((base, tuned), calibration="nofile.txt")
    with pytest.raises(CalibrationError, match=r"seq_len: expected at most 256, .*, got 257"):
        quick((base, tuned), calibration="self", seq_len=257)
    with pytest.raises(MismatchError, match="is this a fine-tune of this base"):
        quick((pairs["llama"][0], tuned))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        quick((tmp_path / "empty", tuned))
    broken = copy_of(tuned, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="truncated"):
        quick((base, broken))
    shutil.rmtree(broken)
    quantized = copy_of(tuned, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised by fp8"):
        quick((base, quantized))
    assert torch.get_num_threads() == 1
