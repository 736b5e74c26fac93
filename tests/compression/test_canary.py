"""What an artifact says its model says is what the merged model says."""

import json

import families
import pytest
import torch
from tiny_pairs import FAMILIES, VOCAB, copy_of, rewrite, weights_of
from transformers import AutoModelForCausalLM, PhiConfig

from deltacome.compression import compress
from deltacome.format.canary import CANARY_FILE, Canary
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
    for other in (base, tuned):  # which this ratio tells from both
        assert canary.distance(logprobs_of(other, list(canary.ids))) > 0.05


@pytest.mark.parametrize("name", ["small", "PhiForCausalLM"])
def test_rows_added_to_what_did_not_change_else(name, pairs, tmp_path):
    """The rest is the base's, so that nothing of it is packed; Phi's head has a bias besides."""
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
    weights["model.embed_tokens.weight"] = torch.cat([rows, rows[:8] + 0.1])
    rewrite(tuned, weights)
    config = (tuned / "config.json").read_text()
    (tuned / "config.json").write_text(
        config.replace(f'"vocab_size": {VOCAB}', f'"vocab_size": {VOCAB + 8}')
    )
    options = {"samples": 4, "seq_len": 16}
    artifact = compress(base, tuned, tmp_path / "a", ratio=6, calibration=text, **options)
    assert max(check(base, artifact, tmp_path / "m").ids) < VOCAB
