import copy
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from artifact_helpers import TERMS, random_artifact, write_artifact
from runtime_helpers import CONFIGS, assert_close, load, logits, some_ids
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    Mamba2Config,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
import families

from deltacome.arch.checkpoint import Checkpoint
from deltacome.errors import ArtifactError, DeltaError, MismatchError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.runtime import attach, base_for, merge
from deltacome.runtime.configs import check_config


def snapshot(model):
    """Every parameter and buffer: the object, and a copy of its bytes."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
    }
    return {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_untouched(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name][0] is tensor, name
        assert torch.equal(after[name][1], values), name
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_attached_is_merged_and_detached_is_base(bases, tmp_path, family, terms):
    artifact = random_artifact(bases[family], tmp_path / "delta", terms=terms)
    merged = load(merge(bases[family], artifact, tmp_path / "merged"))
    model = load(bases[family])
    ids = some_ids()
    before, base_logits = snapshot(model), logits(model, ids)
    with attach(model, artifact) as attachment:
        tuned_logits = logits(model, ids)
        assert attachment.artifact is artifact
        assert attachment.model is model
    assert_close(tuned_logits, logits(merged, ids))
    assert (tuned_logits - base_logits).abs().max() > 0.1 * base_logits.abs().max()
    assert_untouched(model, before)
    assert torch.equal(logits(model, ids), base_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(bases, tmp_path, dtype):
    artifact = random_artifact(bases["qwen2"], tmp_path / "delta")
    merged = load(merge(bases["qwen2"], artifact, tmp_path / "merged"))
    model = load(bases["qwen2"], dtype)
    if dtype == torch.float16:  # rounded twice, so another fingerprint: refused, not guessed
        with pytest.raises(MismatchError, match=r"wrong base.*in bfloat16 or float32"):
            attach(model, artifact)
        return
    with attach(model, artifact):
        got = logits(model, some_ids())
        assert got.dtype == dtype
    assert_close(got.float(), logits(merged, some_ids()), 0.05)


def test_same_tensors_stay_and_cost_nothing(bases, tmp_path):
    same = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias")
    artifact = random_artifact(bases["qwen2"], tmp_path / "delta", same=same)
    merged = load(merge(bases["qwen2"], artifact, tmp_path / "merged"))
    model = load(bases["qwen2"])
    before = dict(model.named_parameters())
    with attach(model, artifact):
        for name in same:
            assert model.get_parameter(name) is before[name]
        assert_close(logits(model, some_ids()), logits(merged, some_ids()))


def test_artifact_may_go_away_once_attached(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    with attach(model, tmp_path / "delta"):
        expected = logits(model, some_ids())
        for file in artifact.path.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
        assert torch.equal(logits(model, some_ids()), expected)


def test_hooks_of_others_see_the_tuned_output(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    with attach(model, artifact):
        got = logits(model, some_ids())
    assert torch.equal(seen[0], got)


def test_any_module_with_the_names_of_the_checkpoint(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    merged = load(merge(bases["llama"], artifact, tmp_path / "merged"))
    plain = torch.nn.Module()
    plain.model, plain.lm_head = load(bases["llama"]).model, load(bases["llama"]).lm_head
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with attach(plain, artifact):
        assert_close(plain.lm_head(x), merged.lm_head(x))


# --- vocabularies --------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_grown_vocabulary(bases, tmp_path, family, terms):
    base = bases[family]
    artifact = random_artifact(base, tmp_path / "delta", vocab=300, terms=terms)
    merged = load(merge(base, artifact, tmp_path / "merged"))
    model = load(base)
    before, ids = snapshot(model), some_ids(vocab=300)
    assert (ids >= 131).any()
    assert (ids < 131).any()
    with attach(model, artifact):
        got = logits(model, ids)
        assert got.shape[-1] == 300
        assert_close(got, logits(merged, ids))
        assert model.config.vocab_size == 300
        assert model.get_input_embeddings().num_embeddings == 300
        assert model.get_output_embeddings().out_features == 300
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        for beams in (1, 3):
            said = model.generate(ids, num_beams=beams, **options)
            assert torch.equal(said, merged.generate(ids, num_beams=beams, **options))
        assert (said[:, ids.shape[1] :] >= 131).any()
    assert_untouched(model, before)
    assert model.config.vocab_size == 131
    assert model.get_input_embeddings().num_embeddings == 131
    assert logits(model, some_ids()).shape[-1] == 131


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_smaller_vocabulary(bases, tmp_path, family):
    artifact = random_artifact(bases[family], tmp_path / "delta", vocab=100)
    merged = load(merge(bases[family], artifact, tmp_path / "merged"))
    model = load(bases[family])
    before, ids = snapshot(model), some_ids(vocab=100)
    with attach(model, artifact):
        assert_close(logits(model, ids), logits(merged, ids))
        assert logits(model, ids).shape[-1] == 100
        with pytest.raises(IndexError):
            logits(model, torch.tensor([[100]]))
    assert_untouched(model, before)


def test_untouched_rows_with_new_ones(bases, tmp_path):
    """Rows added to an embedding whose other rows stayed: no bands, only exact rows."""
    grown = random_artifact(bases["llama"], tmp_path / "grown", vocab=140)
    records = []
    for record in grown.manifest.records.values():
        if record.shape[0] == 140:
            record = dataclasses.replace(record, plan=())
        records.append(record)
    entries = {}
    for record in records:
        for key in record.entries(grown.manifest.group_size):
            entries[key] = grown._read(key).clone()
    config = json.loads((grown.path / "tuned_config.json").read_text())
    artifact = write_artifact(tmp_path / "delta", records, entries, config=config)
    merged = load(merge(bases["llama"], artifact, tmp_path / "merged"))
    model = load(bases["llama"])
    with attach(model, artifact):
        assert_close(logits(model, some_ids(vocab=140)), logits(merged, some_ids(vocab=140)))


@pytest.mark.parametrize("vocab", [None, 140, 100])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_tying_differs_between_base_and_tuned(bases, tmp_path, family, vocab):
    tie = family == "llama"
    artifact = random_artifact(bases[family], tmp_path / "delta", vocab=vocab, tie=tie)
    merged = load(merge(bases[family], artifact, tmp_path / "merged"))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
    model = load(bases[family])
    before, ids = snapshot(model), some_ids(vocab=vocab or 131)
    with attach(model, artifact):
        assert_close(logits(model, ids), logits(merged, ids))
    assert_untouched(model, before)


# --- what comes with the weights -----------------------------------------------------------------


def test_generation_config_is_the_tuned_models(bases, tmp_path):
    text = json.dumps({"eos_token_id": 77, "max_new_tokens": 5}).encode()
    artifact = random_artifact(
        bases["llama"], tmp_path / "delta", files={"generation_config.json": text}
    )
    model = load(bases["llama"])
    before = model.generation_config
    with attach(model, artifact):
        assert model.generation_config.eos_token_id == 77
        assert model.generate(some_ids()).shape[1] <= 9 + 5
    assert model.generation_config is before


@pytest.mark.parametrize("base_has_one", [True, False])
def test_without_a_generation_config_the_tuned_models_own_words_count(
    bases, tmp_path, base_has_one
):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", eos_token_id=77)
    model = load(bases["llama"])
    before = model.generation_config = (
        GenerationConfig(eos_token_id=5)
        if base_has_one
        else GenerationConfig.from_model_config(model.config)
    )
    with attach(model, artifact):  # both have the same file, or neither has one
        assert model.generation_config.eos_token_id == (5 if base_has_one else 77)
    artifact.manifest = dataclasses.replace(
        artifact.manifest, dropped_files=("generation_config.json",)
    )
    with attach(model, artifact):
        assert model.generation_config.eos_token_id == 77
    assert model.generation_config is before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 0.1),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("model_type", "mistral"),
    ],
)
def test_configuration_that_changes_the_code_is_refused(bases, tmp_path, field, value):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", **{field: value})
    model = load(bases["llama"])
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=field):
        attach(model, artifact)
    assert_untouched(model, before)


def test_configuration_of_no_consequence_is_not(bases, tmp_path):
    config = {"eos_token_id": 5, "max_position_embeddings": 128, "use_cache": False}
    artifact = random_artifact(bases["llama"], tmp_path / "delta", dtype="float64", **config)
    attach(load(bases["llama"]), artifact).detach()


def test_rotary_embeddings_that_depend_on_the_number_of_positions():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    base = SimpleNamespace(config=LlamaConfig(rope_parameters=rope))
    tuned = base.config.to_dict()
    check_config(base, tuned)
    with pytest.raises(UnsupportedError, match="max_position_embeddings: the tuned model has 99"):
        check_config(base, tuned | {"max_position_embeddings": 99})


def test_infinity_in_a_configuration(tmp_path):
    """JSON has none, so transformers writes an object in its place."""
    sizes = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}
    config = Mamba2Config(vocab_size=300, num_hidden_layers=1, **sizes, **families.ENDS)
    base = families.make("Mamba2ForCausalLM", config, tmp_path / "base")
    assert "__float__" in (base / "config.json").read_text()
    artifact = random_artifact(base, tmp_path / "delta")
    merged = families.load(merge(base, artifact, tmp_path / "merged"))
    for model in (families.load(base), base_for(base, artifact).eval()):
        with attach(model, artifact):
            assert_close(families.logits(model), families.logits(merged))


@pytest.mark.parametrize(
    ("base", "tuned", "field"),
    [
        (Qwen2Config(), {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers"),
        (GPT2Config(), {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers"),  # its n_layer
        (Qwen2VLConfig(), {"num_hidden_layers": 2 * 10**9}, "num_hidden_layers"),  # of its text
        (
            LlavaConfig(),
            {"text_config": {"num_hidden_layers": 10**9}},
            r"text_config\.num_hidden_l",
        ),
        (LlavaConfig(), {"vision_config": {"intermediate_size": 10**9}}, r"vision_config\.inter"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_counts_are_looked_at_before_lists_are_made_of_them(monkeypatch, base, tuned, field):
    """Configurations list a name or kind for each layer."""
    monkeypatch.setattr(type(base), "from_dict", lambda _: pytest.fail("it was made"))
    with pytest.raises(
        UnsupportedError, match=f"^{field}.*: the tuned model has [12]0{{9}}, the base"
    ):
        check_config(SimpleNamespace(config=base), tuned)


def test_a_name_is_no_model(tmp_path):
    with pytest.raises(UnsupportedError, match="expected a loaded model, got 'base'"):
        attach("base", tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        *("unsloth_version", "unsloth_fixed", "tokenizer_class", "gradient_checkpointing"),
        *("neftune_noise_alpha", "output_router_logits", "router_aux_loss_coef"),
    ],
)
def test_what_trainers_leave_in_a_configuration(field):
    base = SimpleNamespace(config=MixtralConfig())
    check_config(base, MixtralConfig().to_dict() | {field: 0.5})
    with pytest.raises(UnsupportedError, match=f"own_{field}"):
        check_config(base, MixtralConfig().to_dict() | {f"own_{field}": 0.5})


def test_labels_are_not_counted_at_all():
    harmless = {"num_labels": 5, "torch_dtype": "none", "tie_word_embeddings": False}
    tuned = check_config(SimpleNamespace(config=Qwen2Config()), harmless)
    assert (tuned.num_labels, tuned.tie_word_embeddings) == (2, False)
    base = LlavaConfig()
    for part, own in base.to_dict().items():
        if part in base.sub_configs:
            tuned = check_config(SimpleNamespace(config=base), {part: own | {"num_labels": 5}})
            assert getattr(tuned, part).num_labels == 2


# --- refusals ------------------------------------------------------------------------------------


def test_wrong_base(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"layers\.1\.mlp\.down_proj\.weight: wrong base"):
        attach(model, artifact)
    assert_untouched(model, before)


def test_another_shape(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    layer = model.model.layers[0]
    layer.mlp.up_proj = torch.nn.Linear(48, 81, bias=False)
    with pytest.raises(MismatchError, match=r"up_proj.*expected shape \(80, 48\), got \(81, 48\)"):
        attach(model, artifact)


def test_tensors_that_the_model_lacks(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    del model.model.layers[1]
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"lacks 9 of .*layers\.1\.input_layernorm\.weight"):
        attach(model, artifact)
    assert_untouched(model, before)


def test_tensors_that_the_artifact_lacks(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(MismatchError, match=r"no record of 2 parameters.*extra\.weight"):
        attach(model, artifact)


def test_no_values_on_the_meta_device(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    with pytest.raises(UnsupportedError, match="meta device"):
        attach(load(bases["llama"]).to("meta"), artifact)


def test_attached_already(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    ids = some_ids()
    with attach(model, artifact):
        expected = logits(model, ids)
        for again in (model, model.model):
            with pytest.raises(UnsupportedError, match="attached already"):
                attach(again, artifact)
        assert torch.equal(logits(model, ids), expected)
    with attach(model, artifact) as attachment:
        assert torch.equal(logits(model, ids), expected)
        attachment.detach()
        base_logits = logits(model, ids)
        attachment.detach()
    assert torch.equal(logits(model, ids), base_logits)


@pytest.mark.parametrize("after", [0, 1, 5, 14])
def test_failure_half_way_leaves_the_base(bases, tmp_path, monkeypatch, after):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", vocab=140)
    model = load(bases["llama"])
    before, expected = snapshot(model), logits(model, some_ids())
    calls = []

    def blob(self, name, kind):
        calls.append(name)
        if len(calls) > after:
            raise ArtifactError("the disk went away")
        return self._read(f"{name}.{kind}")

    monkeypatch.setattr(Artifact, "blob", blob)
    with pytest.raises(ArtifactError, match="disk went away"):
        attach(model, artifact)
    assert len(calls) == after + 1
    assert_untouched(model, before)
    assert torch.equal(logits(model, some_ids()), expected)
    monkeypatch.undo()
    attach(model, artifact).detach()


def test_unknown_implementation(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    with pytest.raises(UnsupportedError, match="'fast'"):
        attach(load(bases["llama"]), artifact, impl="fast")


def test_module_that_is_no_linear_layer(tmp_path):
    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "base")
    artifact = random_artifact(tmp_path / "base", tmp_path / "delta")
    with pytest.raises(UnsupportedError, match=r"Conv1D"):
        attach(model, artifact)


def test_forward_that_someone_replaced(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda input: input * 2
    with pytest.raises(UnsupportedError, match=r"up_proj.*replaced"):
        attach(model, artifact)


def test_embedding_that_does_more_than_scale(bases, tmp_path):
    class Normed(torch.nn.Embedding):
        def forward(self, input):
            return torch.nn.functional.normalize(super().forward(input), dim=-1)

    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    model.model.embed_tokens.__class__ = Normed
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens\.weight.*Normed"):
        attach(model, artifact)
    assert_untouched(model, before)


def test_embedding_that_shortens_its_rows(bases, tmp_path):
    """It writes to its weight whenever it is called."""
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    model.model.embed_tokens.max_norm = 1.0
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight: expected .*Embedding"):
        attach(model, artifact)
    assert_untouched(model, before)


def test_rows_added_to_a_layer_with_a_bias(tmp_path):
    base = families.make(
        "GPTJForCausalLM", families.FAMILIES["GPTJForCausalLM"](), tmp_path / "base"
    )
    artifact = random_artifact(base, tmp_path / "delta", vocab=310)
    with pytest.raises(UnsupportedError, match=r"lm_head\.weight: rows added to a .* with a bias"):
        attach(families.load(base), artifact)


def test_embedding_that_takes_no_ids(tmp_path):
    """OPT's positions are those of an attention mask."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=300, num_hidden_layers=1, max_position_embeddings=32, **sizes)
    base = families.make("OPTForCausalLM", config, tmp_path / "base")
    artifact = random_artifact(base, tmp_path / "delta")
    with pytest.raises(UnsupportedError, match=r"embed_positions\.weight.*OPTLearned.*merge"):
        attach(families.load(base), artifact)


def test_gradients_are_refused_not_wrong(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    with attach(model, artifact):
        out = model(input_ids=some_ids()).logits
        assert not out.requires_grad
        embeds = torch.randn(1, 3, 48, requires_grad=True)
        with pytest.raises(UnsupportedError, match="inference"):
            model(inputs_embeds=embeds)


def test_what_others_set_on_a_model_is_there_again(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    model.lm_head.weight.requires_grad_(False)
    model.save_pretrained = theirs = lambda folder: None
    with attach(model, artifact):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert model.save_pretrained is theirs


def test_half_tuned_weights_cannot_be_saved(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with attach(model, artifact):
        for part in (model, model.model):
            with pytest.raises(DeltaError, match="detach before saving"):
                part.save_pretrained(tmp_path / "saved")
        with pytest.raises(DeltaError, match="detach before saving"):
            model.model.layers[0].self_attn.state_dict()
        assert not (tmp_path / "saved").exists()
    model.model.save_pretrained(tmp_path / "saved")
    got = model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_half_tuned_models_cannot_be_copied(bases, tmp_path):
    """A copy's layers would call those of the original."""
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    with attach(model, artifact):
        for part in (model, model.lm_head):
            with pytest.raises(DeltaError, match=r"copying \(`Attachment\.detach`\)"):
                copy.deepcopy(part)
            with pytest.raises(DeltaError, match="detach before"):
                torch.save(part, io.BytesIO())
    assert torch.equal(logits(copy.deepcopy(model), some_ids()), logits(model, some_ids()))
    torch.save(model.lm_head, io.BytesIO())


def test_half_tuned_models_cannot_be_cast_or_moved(bases, tmp_path):
    """What was swapped out would not go with them."""
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model = load(bases["llama"])
    before = logits(model, some_ids())
    with attach(model, artifact):
        expected = logits(model, some_ids())
        for change in (model.half, lambda: model.to("meta"), model.model.bfloat16):
            with pytest.raises(DeltaError, match="detach before casting or moving"):
                change()
        assert model.to("cpu", torch.float32) is model  # as it is already
        assert torch.equal(logits(model, some_ids()), expected)
    assert torch.equal(logits(model, some_ids()), before)
    assert model.bfloat16().dtype == torch.bfloat16


def test_half_tuned_models_cannot_be_loaded_into_or_resized(bases, tmp_path):
    """New layers would run without their deltas."""
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    model, weights = load(bases["llama"]), load(bases["llama"]).state_dict()
    before = snapshot(model)
    with attach(model, artifact):
        expected = logits(model, some_ids())
        for change in (
            lambda: model.load_state_dict(weights),
            lambda: model.model.norm.load_state_dict({"weight": torch.ones(48)}),
            lambda: model.resize_token_embeddings(140),
        ):
            with pytest.raises(DeltaError, match="detach before loading weights or resizing"):
                change()
        assert torch.equal(logits(model, some_ids()), expected)
    assert_untouched(model, before)
    model.load_state_dict(weights)
    assert model.resize_token_embeddings(140).num_embeddings == 140


# --- compiled ------------------------------------------------------------------------------------


def test_compiled_code_follows_attach_and_detach(bases, tmp_path):
    """So does code that was compiled before: it must never go on serving the base."""
    torch._dynamo.reset()
    artifact = random_artifact(bases["gemma3"], tmp_path / "delta", vocab=140)
    model = load(bases["gemma3"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = some_ids()
    base_logits = logits(model, ids)
    assert_close(logits(compiled, ids), base_logits)
    with attach(compiled, artifact):
        expected = logits(model, ids)
        assert expected.shape[-1] == 140
        assert_close(logits(compiled, ids), expected)
    assert_close(logits(compiled, ids), base_logits)


def test_double_precision_has_the_base_bit_for_bit(bases, tmp_path):
    artifact = random_artifact(bases["llama"], tmp_path / "delta", terms="mixed")
    model = load(bases["llama"], torch.float64)
    base_logits = logits(model, some_ids(rows=2))
    with attach(model, {"math": artifact}) as attached, attached.using([None, "math"]):
        assert attached.impl == "reference"
        got = logits(model, some_ids(rows=2))
    assert torch.equal(got[0], base_logits[0])
    assert not torch.equal(got[1], base_logits[1])
    with (
        attach(model, {"math": artifact}, impl="cpu") as attached,
        attached.using("math"),
        pytest.raises(MismatchError, match="at most 32 bits, got torch"),
    ):
        logits(model, some_ids())


def test_weights_that_the_model_reads_itself_are_refused(bases, tmp_path, monkeypatch):
    artifact = random_artifact(bases["llama"], tmp_path / "delta")
    name = "model.layers.1.self_attn.o_proj.weight"
    monkeypatch.setattr("deltacome.runtime.match.bypassed", lambda model: frozenset([name]))
    with pytest.raises(UnsupportedError, match=f"{name}.*without calling its layer"):
        attach(load(bases["llama"]), artifact)


def test_weights_that_the_model_reads_itself_while_it_trains(tmp_path):
    """As the kernel for a whole Mamba layer does while it trains; otherwise `out_proj` is called."""
    name = "MambaForCausalLM"
    base = families.make(name, families.FAMILIES[name](), tmp_path / "base")
    names = Checkpoint(base).tensors
    others = [name for name in names if "out_proj" not in name]
    artifact = random_artifact(base, tmp_path / "delta", same=others)
    model = families.load(base).train()
    with pytest.raises(UnsupportedError, match=r"out_proj\.weight: .*its layer.* eval\(\) first"):
        attach(model, artifact)
    with attach(model.eval(), artifact):
        for module in (model, model.backbone.layers[0].mixer):
            with pytest.raises(DeltaError, match=r"while it trains.*detach first"):
                module.train()
        assert not model.eval().training
    assert model.train().training


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_under_autocast_sums_are_float32_and_types_the_layers(bases, tmp_path, impl):
    artifact = random_artifact(bases["qwen2"], tmp_path / "delta")
    model, seen = load(bases["qwen2"]), []
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with attach(model, {"math": artifact}, impl=impl) as attached, attached.using("math"):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    assert seen == [torch.bfloat16]
    merged = load(merge(bases["qwen2"], artifact, tmp_path / "merged"))
    with torch.no_grad():
        wanted = merged.model.layers[0].self_attn.q_proj(x)
    assert_close(y.float(), wanted, 3e-2)
