"""Several tenants attached at once: each row of a batch is its own tenant's."""

import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from artifact_helpers import PLAN, random_artifact
from runtime_helpers import CONFIGS, assert_close, load, logits, some_ids
from test_attach import assert_untouched, snapshot
from transformers import Mamba2Config

from deltacome.errors import MismatchError, UnsupportedError
from deltacome.format.spec import Band
from deltacome.runtime import attach, merge

sys.path.insert(0, str(Path(__file__).parents[1] / "compression"))
import families
from tiny_pairs import rewrite, weights_of

from deltacome import compress

NAMES = ("math", "code", "chat")
PLANS = (PLAN, (Band(4, 3), Band(2, 9)), (Band(8, 1),))
KINDS = ("bands", "mixed", "mixed")


def make_tenants(base, folder):
    """Artifacts, each with its own plan; one of them leaves some tensors alone."""
    same = ("model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight")
    return {
        name: random_artifact(
            *(base, folder / name),
            seed=seed,
            plan=plan,
            terms=terms,
            same=same if name == "chat" else (),
        )
        for seed, (name, plan, terms) in enumerate(zip(NAMES, PLANS, KINDS, strict=True))
    }


@pytest.fixture(params=CONFIGS)
def family(request, bases, tmp_path):
    """(model, base folder, tenants, merged models) of one family."""
    base = bases[request.param]
    tenants = make_tenants(base, tmp_path)
    merged = {
        name: load(merge(base, artifact, tmp_path / f"{name}-merged"))
        for name, artifact in tenants.items()
    }
    return load(base), base, tenants, merged


def test_each_row_is_its_own_tenants(family):
    model, base, tenants, merged = family
    ids = some_ids(rows=5)
    before, base_logits = snapshot(model), logits(model, ids)
    who = ["code", None, "math", "chat", "code"]
    with attach(model, tenants) as attached:
        assert torch.equal(logits(model, ids), base_logits)  # no tenant was chosen
        with attached.using(who):
            mixed = logits(model, ids)
            for name in NAMES:
                with attached.using(name):
                    assert_close(logits(model, ids), logits(merged[name], ids))
            assert torch.equal(logits(model, ids), mixed)  # the outer choice is back
        assert torch.equal(logits(model, ids), base_logits)
    for row, name in enumerate(who):
        model_of_row = load(base) if name is None else merged[name]
        assert_close(mixed[row], logits(model_of_row, ids)[row])
    assert_untouched(model, before)


def test_a_mixed_batch_generates_what_each_would(family):
    model, base, tenants, merged = family
    ids = some_ids(rows=4)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    who = ["math", "chat", None, "code"]
    with attach(model, tenants) as attached, attached.using(who):
        said = model.generate(ids, **options)
    assert len({tuple(row) for row in said[:, 9:].tolist()}) > 1
    for row, name in enumerate(who):
        alone = load(base) if name is None else merged[name]
        assert torch.equal(said[row], alone.generate(ids[row : row + 1], **options)[0])


def test_one_device_copy_of_a_tied_weight(bases, tmp_path):
    tenants = make_tenants(bases["llama-tied"], tmp_path)
    model = load(bases["llama-tied"])
    with attach(model, tenants) as attached, attached.using("math"):
        logits(model, some_ids())
        largest = max(
            sum(r.nbytes(32) for r in a.manifest.records.values() if r.packed)
            for a in tenants.values()
        )
        pools = {
            cell.cell_contents.bands.pool
            for module in model.modules()
            if "forward" in vars(module)
            for cell in module.forward.__closure__
            if hasattr(cell.cell_contents, "bands") and cell.cell_contents.bands is not None
        }
        (pool,) = pools
        assert pool.blobs_SN.shape == (3, largest)


def test_implementations_agree(bases, tmp_path):
    tenants = make_tenants(bases["qwen2"], tmp_path)
    model, found = load(bases["qwen2"]), {}
    for impl in ("reference", "auto"):
        with attach(model, tenants, impl=impl) as attached, attached.using(["math", "code"]):
            found[impl] = logits(model, some_ids())
    assert_close(found["auto"], found["reference"])


def test_names_and_batches_that_do_not_fit(bases, tmp_path):
    tenants = make_tenants(bases["llama"], tmp_path)
    model = load(bases["llama"])
    with attach(model, tenants) as attached:
        with pytest.raises(MismatchError, match=r"\['math', 'code', 'chat'\], got 'maths'"):
            attached.using("maths").__enter__()
        with pytest.raises(MismatchError, match=r"batch of 3 rows.*\(2, 9"):  # noqa: SIM117
            with attached.using(["math", "code", None]):
                logits(model, some_ids())
        with pytest.raises(MismatchError, match="see `artifacts`"):
            _ = attached.artifact
        assert set(attached.artifacts) == set(NAMES)
    with (
        attach(model, tenants["math"]) as attached,
        pytest.raises(UnsupportedError, match="attached alone"),
    ):
        attached.using("math")
    with pytest.raises(MismatchError, match="at least one"):
        attach(model, {})
    for name in ("", None):  # None is the base
        with pytest.raises(MismatchError, match="expected a name for each"):
            attach(model, tenants | {name: tenants["math"]})


def test_who_asks_for_a_tenant_that_was_detached_does_not_get_the_base(bases, tmp_path):
    model = load(bases["llama"])
    attached = attach(model, make_tenants(bases["llama"], tmp_path))
    with attached.using("math"):
        attached.detach()  # leaving the block is no error
    with pytest.raises(UnsupportedError, match="detached already"):
        attached.using("math")


def test_what_several_tenants_cannot_each_have(bases, tmp_path):
    model = load(bases["llama"])
    tenants = make_tenants(bases["llama"], tmp_path)
    grown = random_artifact(bases["llama"], tmp_path / "grown", vocab=140)
    with pytest.raises(UnsupportedError, match=r"grown.*vocabulary of another size.*merge"):
        attach(model, tenants | {"grown": grown})
    other = random_artifact(bases["llama"], tmp_path / "other", group_size=64)
    with pytest.raises(UnsupportedError, match=r"scale groups, got \[32, 64\]"):
        attach(model, tenants | {"other": other})

    class Centered(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(weight.clone()), 1e-6

        def forward(self, x):
            return torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight)

    model.model.norm = Centered(model.model.norm.weight.detach())
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight.*RMS norm.*Centered"):
        attach(model, tenants)


def test_norms_that_take_a_gate(tmp_path):
    """Mamba 2's is an RMS norm without its gate, and the model gives it one."""
    sizes = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}
    config = Mamba2Config(vocab_size=300, num_hidden_layers=1, **sizes, **families.ENDS)
    base = families.make("Mamba2ForCausalLM", config, tmp_path / "base")
    frozen = [name for name in weights_of(base) if "mixer" in name and "mixer.norm" not in name]
    artifact = random_artifact(base, tmp_path / "delta", same=frozen)
    with pytest.raises(UnsupportedError, match=r"mixer\.norm\.weight: .*an RMS norm, got .*Gated"):
        attach(families.load(base), {"a": artifact})


def test_a_bias_that_the_model_reads_without_calling_its_layer(tmp_path):
    """Mamba's `dt_proj`: what the layer's forward would add is never computed."""
    name = "MambaForCausalLM"
    base = families.make(name, families.FAMILIES[name](), tmp_path / "base")
    others = [name for name in weights_of(base) if "dt_proj.bias" not in name]
    artifact = random_artifact(base, tmp_path / "delta", same=others)
    model = families.load(base)
    with pytest.raises(
        UnsupportedError, match=r"dt_proj\.bias: .*without calling its layer.*alone"
    ):
        attach(model, {"a": artifact})
    merged = families.load(merge(base, artifact, tmp_path / "merged"))
    with attach(model, artifact):
        assert_close(families.logits(model), families.logits(merged))


def test_compiled(bases, tmp_path):
    torch._dynamo.reset()
    tenants = make_tenants(bases["gemma3"], tmp_path)
    model = load(bases["gemma3"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = some_ids()
    base_logits = logits(compiled, ids)
    with attach(compiled, tenants) as attached:
        for who in ("math", ["code", None], "chat"):
            with attached.using(who):
                assert_close(logits(compiled, ids), logits(model, ids))
    assert_close(logits(compiled, ids), base_logits)


def test_one_compilation_serves_every_mix_of_tenants(bases, tmp_path):
    torch._dynamo.reset()
    model, ids = load(bases["llama"]), some_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with attach(compiled, make_tenants(bases["llama"], tmp_path)) as attached:
        names = [*attached.artifacts, None]
        for who in ("math", ["math", "code"]):
            with attached.using(who):
                logits(compiled, ids)
        with torch.compiler.set_stance("fail_on_recompile"):
            for who in (*names[:-1], *map(list, itertools.product(names, repeat=len(ids)))):
                with attached.using(who):
                    assert_close(logits(compiled, ids), logits(model, ids))


def test_a_head_that_the_tuned_model_alone_ties_is_refused(bases, tmp_path):
    for same in ((), ("model.embed_tokens.weight",)):
        tied = random_artifact(bases["llama"], tmp_path / f"tied-{len(same)}", tie=True, same=same)
        with pytest.raises(
            UnsupportedError, match=r"lm_head\.weight: a head tied to the embedding"
        ):
            attach(load(bases["llama"]), {"tied": tied})


def test_rows_of_layers_beside_the_text_model(tmp_path):
    """Two pictures of one row are two rows of the projector."""
    name = "LlavaForConditionalGeneration"
    base = families.make(name, families.FAMILIES[name](), tmp_path / "base")
    weights = weights_of(base)
    for who, seed in (("math", 1), ("code", 2)):
        tuned = Path(shutil.copytree(base, tmp_path / who))
        changed = families.moved(weights, seed)
        rewrite(tuned, {n: w if "vision" in n else changed[n] for n, w in weights.items()}, None)
    tenants = {
        who: compress(base, tmp_path / who, tmp_path / f"{who}-delta", ratio=2, calibration="none")
        for who in ("math", "code")
    }
    model = families.load(base)
    with attach(model, tenants) as attached:
        with attached.using("math"):
            got = families.logits(model)
        with pytest.raises(UnsupportedError, match=r"projector.*outside the text model"):
            attached.using(["math", None, "code"]).__enter__()
        with attached.using([None, None, None]):
            assert torch.equal(families.logits(model), families.logits(families.load(base)))
    merged = families.load(merge(base, tenants["math"], tmp_path / "merged"))
    assert_close(got, families.logits(merged), 1e-4)
