"""Families differ in biases, norms, fused and tied matrices and windows, and no code knows of it."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from tiny_pairs import FAMILIES, text_lines, weights_of, write_jsonl
from transformers import AutoModelForCausalLM

from deltacome import Artifact, compress, merge
from deltacome.compression.calibration import Calibration
from deltacome.compression.capture import Stream
from deltacome.compression.data import calibration_rows
from deltacome.format.codec import dense

ROWS = {"samples": 10, "seq_len": 24, "seed": 0}
"""Longer than the sliding windows, which are 8."""


@dataclass
class Compressed:
    base: dict
    tuned: dict
    folders: tuple
    artifact: Artifact
    groups: list[list[str]]
    """Over all blocks, in the order of compression."""
    rows: list[list[int]]

    def restored(self, name):
        """float32: base + bands where there are bands, else the tuned value."""
        record = self.artifact.manifest.records[name]
        if not record.plan:
            return self.tuned[name].float()
        return self.base[record.base_name].float() + dense(self.artifact.bands(name))


@pytest.fixture(scope="module", params=FAMILIES)
def compressed(request, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    texts = [{"text": line} for line in text_lines(10, seed=4)]
    source = write_jsonl(folder / "c.jsonl", texts)
    base, tuned = pairs[request.param]
    groups = []
    ask = Stream.groups

    def note(self, name):
        groups.extend(ask(self, name))
        return ask(self, name)

    with patch.object(Stream, "groups", note):
        artifact = compress(base, tuned, folder / "out", ratio=8, calibration=source, **ROWS)
    rows = [row.ids for row in calibration_rows(Calibration(source, **ROWS), tuned)]
    assert len({len(row) for row in rows}) > 3  # so that there is padding
    return Compressed(weights_of(base), weights_of(tuned), (base, tuned), artifact, groups, rows)


def test_linears_with_one_input_are_one_group(compressed):
    short = [sorted(name.split(".")[-1] for name in group) for group in compressed.groups]
    if any("qkv" in name for name in compressed.tuned):
        assert short == 2 * [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    else:
        attention = [["k_proj", "q_proj", "v_proj"], ["o_proj"]]
        assert short == 2 * [*attention, ["gate_proj", "up_proj"], ["down_proj"]]


def test_every_tensor_has_one_account(compressed):
    records = compressed.artifact.manifest.records
    assert set(records) == set(compressed.tuned)
    for name, record in records.items():
        assert record.kind == ("bands" if compressed.tuned[name].ndim == 2 else "exact")
        assert record.dtype == "bfloat16"
        if record.kind == "exact":
            assert torch.equal(compressed.artifact.exact(name), compressed.tuned[name])
    assert compressed.artifact.ratio() == pytest.approx(8, rel=0.02)


def inputs_gram(model, module, rows):
    """float64 gram of what reaches a module; each row alone, so nothing is padded."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    handle.remove()
    x_TI = torch.cat([x.flatten(0, -2) for x in seen])
    return x_TI.T @ x_TI


def energy(w, gram):
    return float(((w.double() @ gram) * w.double()).sum())


def test_errors_are_those_of_a_dense_model_that_is_compressed_so_far(compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed.folders[1], dtype=torch.float32)
    assert not model.training
    records = compressed.artifact.manifest.records

    def check(names, module):
        gram = inputs_gram(model, module, compressed.rows)
        for name in names:
            delta = (
                compressed.tuned[name].float() - compressed.base[records[name].base_name].float()
            )
            error = compressed.restored(name) - compressed.tuned[name].float()
            expected = energy(error, gram) / energy(delta, gram)
            assert records[name].error == pytest.approx(expected, rel=5e-3), name
            assert 0 < expected < 0.1

    for group in compressed.groups:
        check([f"{name}.weight" for name in group], model.get_submodule(group[0]))
        for name in group:
            model.get_submodule(name).weight.data = compressed.restored(f"{name}.weight")
    head = "lm_head.weight" if "lm_head.weight" in records else "model.embed_tokens.weight"
    check([head], model.get_output_embeddings())
    if head == "lm_head.weight":  # one-hot inputs of equal frequency: a white gram
        name = "model.embed_tokens.weight"
        delta = compressed.tuned[name].float() - compressed.base[name].float()
        error = compressed.restored(name) - compressed.tuned[name].float()
        expected = float(error.square().sum() / delta.square().sum())
        assert records[name].error == pytest.approx(expected, rel=1e-3)


def test_merged_is_base_plus_bands(compressed, tmp_path):
    merged = weights_of(merge(compressed.folders[0], compressed.artifact, tmp_path / "merged"))
    assert set(merged) == set(compressed.tuned)
    for name, tensor in merged.items():
        assert torch.equal(tensor, compressed.restored(name).to(torch.bfloat16)), name
