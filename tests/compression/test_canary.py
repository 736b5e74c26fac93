"""The outputs that an artifact records for its model are those of the merged model."""

import json

import families
import pytest
import torch
from tiny_pairs import FAMILIES, VOCAB, copy_of, rewrite, weights_of
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PhiConfig

from deltacome import skeleton
from deltacome.arch.checkpoint import Checkpoint
from deltacome.compression import compress
from deltacome.compression.calibration import Calibration
from deltacome.compression.data import calibration_rows
from deltacome.compression.search import sample_linears
from deltacome.format.canary import CANARY_FILE, Canary, canary_ids
from deltacome.runtime import merge


@torch.no_grad()
def logprobs_of(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(said[i, id]) for i, id in enumerate(ids[1:])]


def check(base, artifact, folder):
    canary = Canary.from_json(artifact.file(CANARY_FILE))
    assert canary.distance(logprobs_of(merge(base, artifact, folder), list(canary.ids))) < 0.02
    assert not (folder / CANARY_FILE).exists()
    return canary


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_compressed_models(family, pairs, tmp_path):
    base, tuned = pairs[family]
    artifact = compress(base, tuned, tmp_path / "a", ratio=24, calibration="none")
    canary = check(base, artifact, tmp_path / "m")
    for other in (base, tuned):  # at this ratio it differs from both
        assert canary.distance(logprobs_of(other, list(canary.ids))) > 0.05


@pytest.mark.parametrize("name", ["small", "PhiForCausalLM"])
def test_rows_added_to_what_did_not_change_else(name, pairs, tmp_path):
    """Their other rows are the base's, so that nothing of them is packed; Phi's head also has a bias."""
    if name == "small":
        base = pairs[name][0]
    else:
        base = families.make(name, PhiConfig(**families.TEXT), tmp_path / "base")
    tuned, weights = copy_of(base, tmp_path / "tuned"), weights_of(base)
    moved = families.moved(weights)
    grown = {n: torch.cat([w, moved[n][:8]]) for n, w in weights.items() if len(w) == VOCAB}
    rewrite(tuned, moved | grown, None)
    config = json.loads((tuned / "config.json").read_text()) | {"vocab_size": VOCAB + 8}
    (tuned / "config.json").write_text(json.dumps(config))
    artifact = compress(base, tuned, tmp_path / "a", ratio=3, calibration="none")
    assert {artifact.manifest.records[n].kind for n in grown} == {"exact"}
    check(base, artifact, tmp_path / "m")


def test_calibrated_and_with_a_grown_vocabulary(pairs, text, tmp_path):
    base, tuned = pairs["llama-tied"]
    tuned = copy_of(tuned, tmp_path / "tuned")
    weights = weights_of(tuned)
    rows = weights["model.embed_tokens.weight"]
    added = 89  # of so many rows, random tokens would be among those that were added
    assert max(canary_ids(VOCAB + added)) >= VOCAB
    weights["model.embed_tokens.weight"] = torch.cat([rows, rows[:added] + 0.1])
    rewrite(tuned, weights)
    config = (tuned / "config.json").read_text()
    (tuned / "config.json").write_text(
        config.replace(f'"vocab_size": {VOCAB}', f'"vocab_size": {VOCAB + added}')
    )
    options = {"samples": 4, "seq_len": 16}
    artifact = compress(base, tuned, tmp_path / "a", ratio=6, calibration=text, **options)
    assert max(check(base, artifact, tmp_path / "m").ids) < VOCAB


class Shifted(LlamaForCausalLM):
    """A Llama with a saved buffer outside its blocks, like the statistics of a vision tower."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_buffer("shift", torch.zeros(config.hidden_size))
        self.model.embed_tokens.register_forward_hook(self._shift)

    def _shift(self, module, args, output):
        return output + self.model.shift


Shifted.__name__ = "LlamaForCausalLM"  # its name in configurations


def test_a_saved_buffer_outside_of_blocks(pairs, text, tmp_path, monkeypatch):
    # Which module object `transformers` is depends on what was imported first.
    monkeypatch.setattr(skeleton.transformers, "LlamaForCausalLM", Shifted)
    shifted = []
    for folder in pairs["llama"]:
        shifted.append(copy_of(folder, tmp_path / folder.name))
        rewrite(shifted[-1], weights_of(folder) | {"model.shift": torch.arange(128) / 128}, None)
    artifact = compress(*shifted, tmp_path / "a", ratio=6, calibration=text, samples=4, seq_len=16)
    canary = Canary.from_json(artifact.file(CANARY_FILE))
    merged = merge(shifted[0], artifact, tmp_path / "m")
    model = Shifted.from_pretrained(merged, dtype=torch.float32).eval()
    assert model.model.shift.any()
    with torch.no_grad():
        said = model(torch.tensor([list(canary.ids)])).logits[0].log_softmax(-1)
    assert canary.distance([float(said[i, id]) for i, id in enumerate(canary.ids[1:])]) < 0.02
    rows = calibration_rows(Calibration(text, 4, 16, 0), shifted[1])
    first = [
        sample_linears(Checkpoint(base), Checkpoint(tuned), rows, blocks=1)[0]
        for base, tuned in (pairs["llama"], shifted)
    ]
    assert not torch.allclose(first[0].gram_II, first[1].gram_II, rtol=0.1)
