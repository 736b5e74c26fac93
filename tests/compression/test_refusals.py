"""Bad input is refused with the tensor or file named, no output, and the inputs unchanged."""

import errno
import json

import families
import pytest
import torch
from safetensors.torch import save_file
from tiny_pairs import SMALL, copy_of, make_tokenizer, rewrite, tree, weights_of
from transformers import AutoModelForCausalLM, LlamaConfig

from deltacome import Adaptive, BitDelta, DeltaCome, DeltaError, LowRank, PrinMix, compress
from deltacome.compression.calibration import check_length
from deltacome.errors import (
    CalibrationError,
    CheckpointError,
    DeviceError,
    MismatchError,
    OutputError,
    PlanError,
    UnsupportedError,
)
from deltacome.methods.template import parse_template

QUICK = {"ratio": 4, "samples": 6, "seq_len": 12}
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def refused(tmp_path):
    """Runs a compression that must be refused, and checks that it leaves no trace."""

    def run(base, tuned, kind, match, **options):
        before = tree(tmp_path), tree(base)
        with pytest.raises(kind, match=match) as error:
            compress(base, tuned, tmp_path / "out", **{"calibration": "none"} | QUICK | options)
        assert type(error.value) is kind
        assert (tree(tmp_path), tree(base)) == before
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return str(error.value)

    return run


@pytest.fixture
def pair(pairs, tmp_path):
    """Copies that a test may spoil."""
    return tuple(copy_of(folder, tmp_path / folder.name) for folder in pairs["small"])


def spoil(folder, **changes):
    """Replaces tensors; None removes one."""
    weights = weights_of(folder) | {name.replace("__", "."): w for name, w in changes.items()}
    rewrite(folder, {name: w for name, w in weights.items() if w is not None}, None)


# --- checkpoints ---------------------------------------------------------------------------------


def shard(folder):
    """Splits the weights over two shards."""
    weights = weights_of(folder)
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_a_missing_shard(refused, pair, which):
    shard(pair[which])
    (pair[which] / "model-00002-of-00002.safetensors").unlink()
    refused(*pair, CheckpointError, r"shard model-00002-of-00002\.safetensors .*missing")


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_a_truncated_shard(refused, pair, which):
    shard(pair[which])
    file = pair[which] / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(*pair, CheckpointError, r"model-00001-of-00002\.safetensors: truncated")


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_pickled_weights_alone(refused, pair, which):
    (pair[which] / "model.safetensors").rename(pair[which] / "pytorch_model.bin")
    refused(*pair, CheckpointError, "only pickled weights")


def test_an_adapter_in_place_of_a_model(refused, pair):
    (pair[1] / "model.safetensors").rename(pair[1] / "adapter_model.safetensors")
    (pair[1] / "adapter_config.json").write_text("{}")
    refused(*pair, CheckpointError, "expected a whole model, got an adapter: merge it first")


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_no_such_folder(refused, pair, which):
    given = list(pair)
    given[which] = pair[0] / "none"
    with pytest.raises(
        CheckpointError, match="expected a folder, or org/name on the Hub; found none"
    ):
        compress(*given, pair[0].with_name("out"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [K_PROJ, NORM])
@pytest.mark.parametrize(("which", "whose"), [(0, "base"), (1, "tuned model")])
def test_values_that_are_not_finite(refused, pair, bad, name, which, whose):
    weight = weights_of(pair[which])[name]
    weight.view(-1)[17] = bad
    spoil(pair[which], **{name: weight})
    refused(*pair, CheckpointError, rf"^{name} of the {whose}: expected finite.*flat index 17")


CONFIGS = {
    "unknown": {"model_type": "nonsense"},
    "none": {"model_type": None},
    "of another model": {"model_type": "clip"},
    "of an unknown class": {"architectures": ["MineForCausalLM"]},
    "of a number": {"architectures": [5]},
    "of no list": {"architectures": {"LlamaForCausalLM": 1}},
    "of another type": {"hidden_size": "large"},
    "impossible": {"num_attention_heads": 0},
    "with remote code": {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"},
    },
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_architectures_that_are_not_known(refused, pair, change):
    config = json.loads((pair[1] / "config.json").read_text()) | change
    (pair[1] / "config.json").write_text(json.dumps(config))
    refused(*pair, CheckpointError, "tuned: expected a (model|configuration)")


@pytest.mark.parametrize("content", [None, "", "{", "3"])
def test_a_configuration_that_is_none(refused, pair, content):
    (pair[1] / "config.json").unlink()
    if content is not None:
        (pair[1] / "config.json").write_text(content)
    refused(*pair, CheckpointError, r"tuned(/config\.json)?: expected a model configuration")


def test_a_configuration_of_another_size(refused, pair):
    config = json.loads((pair[1] / "config.json").read_text()) | {"intermediate_size": 100}
    (pair[1] / "config.json").write_text(json.dumps(config))
    match = r"mlp\.down_proj\.weight: the configuration gives shape \(64, 100\).*\(64, 96\)"
    refused(*pair, MismatchError, match)


def test_more_layers_than_the_checkpoint_has(refused, pair):
    config = json.loads((pair[1] / "config.json").read_text()) | {"num_hidden_layers": 3}
    (pair[1] / "config.json").write_text(json.dumps(config))
    refused(*pair, MismatchError, r"9 parameters of LlamaForCausalLM .*model\.layers\.2\.")


def test_an_expert_without_one_of_its_tensors(refused, tmp_path):
    base, tuned = families.make_pair("MixtralForCausalLM", tmp_path / "pair")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    weight = weights_of(tuned)[name]
    spoil(tuned, **{name: None})
    match = (
        r"layers\.1\..*experts\.gate_up_proj: .* gives 4 experts, 8 tensors, .* has 7.* expert 2"
    )
    refused(base, tuned, MismatchError, match)
    spoil(tuned, **{name: weight, name.replace(".2.", ".4."): weight.clone()})
    refused(base, tuned, MismatchError, r"gives 4 experts, 8 tensors, .* has 9.* expert 4")


@pytest.mark.parametrize("which", [0, 1], ids=["base", "tuned"])
def test_weights_that_are_quantised(refused, pair, which):
    config = json.loads((pair[which] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (pair[which] / "config.json").write_text(json.dumps(config))
    refused(*pair, CheckpointError, r"quantised by gptq: load it .* dequantize\(\)")


# --- pairs ---------------------------------------------------------------------------------------


def model_of(folder, **changes):
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL | changes), dtype=torch.bfloat16
    ).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_of_another_shape(refused, pair, tmp_path):
    other = model_of(tmp_path / "other", hidden_size=32)
    refused(
        other, pair[1], MismatchError, r"the base has shape .* is this a fine-tune of this base"
    )


def test_a_base_of_the_same_shape_that_is_unrelated(refused, pair, tmp_path):
    other = model_of(tmp_path / "other", initializer_range=0.12)
    message = refused(other, pair[1], MismatchError, "not a fine-tune of this base")
    assert "16 of 16 changed matrices" in message


def test_a_few_matrices_may_be_far_from_the_base(pair, tmp_path):
    weights = weights_of(pair[1])
    far = {name: -2 * w for name, w in weights.items() if "layers.1.mlp" in name}
    assert len(far) == 3
    spoil(pair[1], **far)
    compress(*pair, tmp_path / "out", calibration="none", **QUICK)


def test_a_base_with_more_layers(refused, pair, tmp_path):
    other = model_of(tmp_path / "other", num_hidden_layers=3)
    match = r"9 tensors of the base are missing, the first is model\.layers\.2\."
    refused(other, pair[1], MismatchError, match)


def test_a_tensor_that_only_the_base_has(refused, pair):
    spoil(pair[0], **{"model.layers.0.extra": torch.ones(3)})
    refused(*pair, MismatchError, r"1 tensors of the base are missing.*model\.layers\.0\.extra")


def test_a_tensor_that_the_tuned_model_lacks(refused, pair):
    spoil(pair[1], **{K_PROJ: None})
    refused(*pair, MismatchError, rf"1 parameters of LlamaForCausalLM .*{K_PROJ}")


@pytest.mark.parametrize("value", [1e20, -3e38])
@pytest.mark.parametrize("method", [BitDelta(), LowRank(), PrinMix()])
def test_a_delta_too_large_for_its_squares(refused, pair, method, value):
    """As one damaged bit of an exponent makes it: finite, and no method can compress it."""
    weight = weights_of(pair[1])[K_PROJ]
    weight[2, 3] = value
    spoil(pair[1], **{K_PROJ: weight})
    ratio = method.default_ratio and 4
    match = r"k_proj\.weight: expected a difference .* float32, got one of up to"
    refused(*pair, CheckpointError, match, method=method, ratio=ratio)


# --- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_a_dtype_that_artifacts_lack(refused, pair, both):
    for folder in pair[not both :]:
        spoil(folder, extra=torch.zeros(3, dtype=torch.uint16))
    refused(*pair, UnsupportedError, r"extra: expected a dtype of .*, got uint16")


def test_a_large_exact_part_is_shown(refused, pair):
    spoil(pair[1], **{"vision.tower.weight": torch.randn(500, 300).to(torch.bfloat16)})
    message = refused(*pair, PlanError, "ratio 4 cannot be met, the largest possible is about")
    lines = message.splitlines()
    (exact,) = [line for line in lines if "exact tensors" in line]
    first = lines[lines.index(exact) + 1]
    assert "vision.tower.weight [500, 300]" in first
    assert "300,000 bytes" in first
    assert any(line.strip().startswith("target") for line in lines)


def test_a_ratio_that_a_fixed_plan_does_not_give(refused, pair):
    method = DeltaCome(parse_template("8:1,2:4"))
    refused(*pair, PlanError, "gives a ratio of .* expected 2 within 2%", method=method, ratio=2)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_ratio_that_nothing_meets(refused, pair, ratio):
    refused(*pair, PlanError, "ratio", ratio=ratio)


def test_a_hole_without_a_ratio(refused, pair):
    refused(*pair, PlanError, "expected a ratio", ratio=None)


def test_a_refusal_does_not_stand_in_the_way_of_the_next_run(refused, pair, tmp_path):
    refused(*pair, PlanError, "ratio", ratio=1e9)
    assert compress(*pair, tmp_path / "out", calibration="none", **QUICK).path.is_dir()


def test_a_ratio_that_nothing_meets_is_refused_before_a_sweep(refused, pair, text):
    steps = []
    options = {"method": Adaptive(), "calibration": text, "progress": steps.append}
    match = "ratio 5000 cannot be met, the largest possible is about"
    refused(*pair, PlanError, match, ratio=5000, **options)
    assert {step.phase for step in steps} == {"survey"}


def test_an_unknown_device(refused, pair):
    refused(*pair, DeviceError, "device: expected auto, .*'gpu'", device="gpu")


def test_an_unknown_dtype(refused, pair):
    refused(*pair, PlanError, "dtype: expected auto", dtype="int8")


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.txt", "", "expected text, got no row"),
        ("c.jsonl", "", "expected text, got no row"),
        ("c.jsonl", '{"text": "one two"}\n{"text"', r"c\.jsonl:2: not valid JSON"),
        ("c.jsonl", '{"words": "one two"}', r"c\.jsonl:1: expected an object with text"),
        ("c.csv", "one,two", r"a name that ends in \.txt or \.jsonl, got c\.csv"),
    ],
)
def test_calibration_text(refused, pair, tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    refused(*pair, CalibrationError, match, calibration=str(tmp_path / name))


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("samples", -1), ("seq_len", 1)])
def test_less_than_a_row_of_two_tokens(refused, pair, text, name, value):
    for source in (text, "self"):
        options = {"calibration": source, name: value}
        refused(*pair, CalibrationError, rf"{name}: expected at least \d, got {value}", **options)


def test_calibration_text_that_is_not_there(refused, pair, tmp_path):
    steps = []
    options = {"method": PrinMix(), "progress": steps.append}
    refused(*pair, CalibrationError, "found none", calibration=str(tmp_path / "c.txt"), **options)
    assert not steps  # refused before the SVDs of its plans


def test_rows_longer_than_the_model_has_positions_for(refused, tmp_path):
    pair = families.make_pair("GPT2LMHeadModel", tmp_path)
    match = "seq_len: expected at most 128, .*tuned, got 129"
    refused(*pair, CalibrationError, match, calibration="self", seq_len=129)
    check_length(128, pair[1])


def test_a_model_without_a_tokenizer(refused, pair, text):
    for file in pair[1].glob("*token*"):
        file.unlink()
    refused(*pair, CalibrationError, "expected a tokenizer", calibration=text)


def test_a_tokenizer_with_more_tokens_than_the_model(refused, pair, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["plusminus"])
    tokenizer.save_pretrained(pair[1])
    (tmp_path / "c.txt").write_text("one two plusminus three")
    match = "token 300.* 300 rows"
    refused(*pair, CalibrationError, match, calibration=str(tmp_path / "c.txt"))


def test_a_template_with_tokens_that_the_model_lacks(refused, pair):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(pair[1])
    match = "calibration self: .* token 300, but the embedding has 300 rows"
    refused(*pair, CalibrationError, match, calibration="self")


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_does_not_take(refused, pair, text, seed):
    for source in (text, "self"):
        refused(*pair, CalibrationError, "seed: expected .* got", calibration=source, seed=seed)


def test_inputs_that_overflow(refused, pair, text):
    # Finite weights whose products are not finite: the error names the linear that these reach.
    weight = weights_of(pair[1])["model.layers.0.mlp.up_proj.weight"]
    huge = torch.full_like(weight, 3e38)
    for folder in pair:
        spoil(folder, **{"model.layers.0.mlp.up_proj.weight": huge})
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.mlp\.down_proj"):
        compress(*pair, pair[0].with_name("out"), calibration=text, **QUICK)
    assert not pair[0].with_name("out").exists()


# --- output --------------------------------------------------------------------------------------


def test_an_output_that_exists(pair, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="the output exists already"):
        compress(*pair, tmp_path / "out", calibration="none", **QUICK)
    assert tree(tmp_path) == before


def test_an_output_below_a_file(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        compress(*pair, tmp_path / "file" / "out", calibration="none", **QUICK)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "fails_at"),
    [
        ("deltacome.format.writer.save_file", 0),  # the first block
        ("deltacome.format.writer.save_file", 2),  # embedding and head
        ("deltacome.format.writer.save_file", 3),  # the artifact itself
        ("deltacome.compression.run.save_file", 0),  # the calibration rows
    ],
)
def test_a_full_disk(pair, text, tmp_path, monkeypatch, place, fails_at):
    out = tmp_path / "out"
    calls = []

    def full(tensors, filename, metadata=None):
        calls.append(filename)
        if len(calls) > fails_at:
            raise FULL
        save_file(tensors, filename, metadata)

    monkeypatch.setattr(place, full)
    before = [tree(folder) for folder in pair]
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        compress(*pair, out, calibration=text, **QUICK)
    assert not out.exists()
    assert [tree(folder) for folder in pair] == before
    monkeypatch.undo()
    resume = out.with_name("out.partial").exists()
    assert compress(*pair, out, calibration=text, resume=resume, **QUICK).path == out
    assert not out.with_name("out.partial").exists()


def test_a_read_only_folder(pair, tmp_path, monkeypatch):
    # Simulated: permissions do not stop every user.
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot be written: .*Permission denied"):
        compress(*pair, tmp_path / "out", calibration="none", **QUICK)


def test_a_fault_leaves_no_trace_either(refused, pair, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("because")

    monkeypatch.setattr("deltacome.compression.pipeline.survey", fail)
    refused(*pair, ZeroDivisionError, "because")


def test_every_refusal_is_of_one_tree():
    kinds = (OutputError, CalibrationError, CheckpointError, DeviceError, MismatchError, PlanError)
    assert all(issubclass(kind, DeltaError) for kind in (*kinds, UnsupportedError))
