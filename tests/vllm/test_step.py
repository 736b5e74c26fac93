"""A step's rows as on a GPU: traced once for batches of any size, captured in graphs.

There is no GPU here: a stand-in for the kernel adds up tile by tile.
"""

import importlib.metadata
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.model_manager import AdapterLRUCache
from vllm.model_executor import models

from deltacome.errors import UnsupportedError
from deltacome.ops.bands import triton as kernels
from deltacome.ops.rows import group_all
from deltacome.ops.slots import BandTable, Pool
from deltacome.vllm import compat
from deltacome.vllm import manager as manager_module
from deltacome.vllm.layers import Delta, NormDelta, _norm_forward, _with_delta
from deltacome.vllm.manager import ModelManager
from deltacome.vllm.places import Part, Place
from deltacome.vllm.refuse import EMBEDS_AHEAD
from deltacome.vllm.settings import Settings
from deltacome.vllm.step import Step, _Rows
from deltacome.vllm.tenant import Tenant

SLOTS, MOST = 8, 400


@pytest.fixture
def launched(monkeypatch):
    """The tile sizes that the kernel was launched with; the stand-in adds 1 + its slot to each row."""
    sizes = []

    def bands(y_TO, x_TI, order_T, tiles_M3, blobs_SN, fields_SPBF, outs, tile, *_):
        sizes.append(tile)
        for slot, start, rows in tiles_M3.tolist():
            assert rows <= tile
            y_TO[order_T[start : start + rows]] += 1 + slot

    monkeypatch.setattr(kernels, "bands", bands)
    return sizes


def step_of_a_gpu():
    step = Step(SLOTS, MOST, torch.device("cpu"))
    step.graphs = True
    step._tokens, step._sampled = (
        _Rows(SLOTS, MOST, torch.device("cpu"), grouped=True) for _ in range(2)
    )
    step.set([], [])
    return step


class Method:
    """Stands in for the engine's linear method."""

    def apply(self, layer, x, bias=None):
        return x.cos()


class Model(nn.Module):
    """A norm over heads and a linear, both hooked."""

    def __init__(self, step):
        super().__init__()
        pool = Pool(SLOTS, 64, device="cpu")
        table = BandTable(pool, 140, [140], max_rank=1, max_bands=1)
        self._delta = Delta(step, table, None, None, False, "triton")
        self.method = _with_delta(Method)()
        ones_SH, base_H = 2 * torch.ones(SLOTS, 70), torch.ones(70)
        delta = NormDelta(step, base_H, ones_SH, 1e-6, "reference")
        self.norm = _norm_forward(lambda x: nn.functional.rms_norm(x, (70,)), delta)

    def forward(self, x_TI):
        heads_THN = self.norm(x_TI.view(-1, 2, 70))
        return self.method.apply(self, heads_THN.view(-1, 140))


def expected(x_TI, slots):
    slot_T1 = torch.tensor(slots)[:, None]
    heads = nn.functional.rms_norm(x_TI.view(-1, 2, 70), (70,)).view(-1, 140)
    return torch.where(slot_T1 < 0, heads, 2 * heads).cos() + 1 + slot_T1


def traced(model):
    """Compiles as the engine does: the full graph, for any number of rows, with all guards dropped."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(
        model,
        fullgraph=True,
        dynamic=False,
        backend=backend,
        options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
    )
    return run, graphs


def test_traced_once_for_batches_of_any_size(launched):
    torch._dynamo.reset()
    step = step_of_a_gpu()
    model, graphs = traced(Model(step))
    for tokens, tile in ((300, 64), (3, 1), (9, 16), (MOST, 64), (2, 1)):
        slots = [(5 * i) % (SLOTS + 1) - 1 for i in range(tokens)]
        step.set(slots, slots, adapters=True)
        x_TI = torch.randn(tokens, 140)
        torch._dynamo.mark_dynamic(x_TI, 0)
        torch.testing.assert_close(model(x_TI), expected(x_TI, slots))
        assert launched.pop() == tile
    assert len(graphs) == 1


def test_a_graph_is_larger_than_its_batch(launched):
    step = step_of_a_gpu()
    model = Model(step)
    for tokens in (300, 3):
        slots = [i % SLOTS for i in range(tokens)]
        step.set(slots, slots, adapters=True)
        padded = [*slots, *[-1] * 5]
        x_TI = torch.randn(tokens + 5, 140)
        torch.testing.assert_close(model(x_TI), expected(x_TI, padded))
    assert launched == [64, 16]


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_of_the_base_alone_have_no_kernels(compiled, launched):
    """And those with adapters have them, whatever `adapters` was when they were traced."""
    torch._dynamo.reset()
    step = step_of_a_gpu()
    model = traced(Model(step))[0] if compiled else Model(step)
    x_TI = torch.randn(9, 140)
    for adapters in (False, True, False):
        step.set([-1] * 9, [-1] * 9, adapters=adapters)
        # If the slots were read, every row would have a tenant.
        step._tokens.all.slot_T.zero_()
        launched.clear()
        model(x_TI)
        assert launched == ([16] if adapters else [])


class Biased(nn.Module):
    """A linear with a bias, to which the tenant of every slot adds one."""

    def __init__(self, step):
        super().__init__()
        table = BandTable(Pool(SLOTS, 64, device="cpu"), 140, [140], max_rank=1, max_bands=1)
        bias_SO = torch.ones(SLOTS + 1, 140)
        bias_SO[-1] = 0
        self._delta = Delta(step, table, None, bias_SO, False, "triton")
        self.method, self.bias = _with_delta(Method)(), torch.zeros(140)

    def forward(self, x_TI):
        return self.method.apply(self, x_TI, self.bias)


@pytest.mark.parametrize("compiled", [False, True])
def test_biases_cost_the_base_alone_nothing(compiled, launched):
    torch._dynamo.reset()
    step = step_of_a_gpu()
    model = traced(Biased(step))[0] if compiled else Biased(step)
    x_TI = torch.randn(9, 140)
    torch._dynamo.mark_dynamic(x_TI, 0)
    for adapters in (True, False):
        step.set([-1] * 9, [-1] * 9, adapters=adapters)
        step._tokens.all.slot_T.zero_()  # if read, every row would have a tenant
        torch.testing.assert_close(model(x_TI), x_TI.cos() + adapters)
    step.set([3, -1], [3, -1])
    expected = x_TI[:2].cos() + torch.tensor([[5.0], [0.0]])
    torch.testing.assert_close(model(x_TI[:2]), expected)


class Copies(TorchDispatchMode):
    """Counts copies into some tensors."""

    def __init__(self, *tensors):
        super().__init__()
        self.addresses, self.count = [t.untyped_storage().data_ptr() for t in tensors], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.count += args[0].untyped_storage().data_ptr() in self.addresses
        return function(*args, **kwargs or {})


def test_a_step_is_one_copy_that_nobody_waits_for(monkeypatch):
    """With memory that is not pinned, the host would wait for the running step."""
    full, pinned = torch.full, []

    def noted(*args, pin_memory=False, **kwargs):
        pinned.append(pin_memory)
        return full(*args, **kwargs)

    monkeypatch.setattr(torch, "full", noted)
    rows = _Rows(SLOTS, MOST, torch.device("cpu"), grouped=True)
    rows.pinned = True
    for slots in ([5, -1, 3, 3] * 20, [0], [7] * MOST, []):
        pinned.clear()
        with Copies(rows.all.slot_T, rows.all.order_T, rows.all.tiles_M3) as copies:
            rows.set(slots)
        assert (copies.count, pinned.count(True)) == (1, 1)
        expected = group_all(torch.tensor([*slots, *[-1] * (MOST - len(slots))]), SLOTS)
        assert torch.equal(rows.all.slot_T, expected.slot_T)
        used = sum(slot >= 0 for slot in slots)
        assert torch.equal(rows.all.order_T[:used], expected.order_T[:used])
        for ours, theirs in zip(rows.all.tiles_M3, expected.tiles_M3, strict=True):
            assert torch.equal(ours[ours[:, 0] >= 0], theirs[theirs[:, 0] >= 0])


def test_on_a_cpu_only_tenants_count():
    step = Step(SLOTS, MOST, torch.device("cpu"))
    step.set([-1, -1], [-1], adapters=True)
    assert step.idle


def manager_of(adapters, slots=None):
    """A manager that has adapters, by number, all of them in slots unless said otherwise."""
    manager = object.__new__(ModelManager)
    manager._registered_adapters = AdapterLRUCache(len(adapters), lambda id: None)
    for id, adapter in adapters.items():
        manager._registered_adapters[id] = adapter
    manager.lora_index_to_id = [*adapters] if slots is None else slots
    manager.step = step_of_a_gpu()
    return manager


def mapped(monkeypatch, adapters, index, prompt, slots=None):
    """The manager of some adapters, after it was given a mapping of ids."""
    monkeypatch.setattr(
        compat.LRUCacheLoRAModelManager, "_set_adapter_mapping", lambda self, mapping: None
    )
    manager = manager_of(adapters, slots)
    manager._set_adapter_mapping(compat.LoRAMapping(index, prompt))
    return manager


def test_made_up_adapters_are_adapters(monkeypatch):
    """The engine captures graphs with them, and tenants then run those graphs."""
    tenants, made_up = {7: Tenant(7, "")}, {7: object()}
    for adapters in (tenants, made_up):
        assert not mapped(monkeypatch, adapters, (7, 0), (7, 0)).step.idle
        assert mapped(monkeypatch, adapters, (0, 0), (0, 0)).step.idle


def test_a_step_uses_the_adapters_of_its_rows_alone(monkeypatch):
    """Those in other slots would otherwise outlive them in vLLM's cache, which drops what is unused."""
    adapters = {2: object(), 1: Tenant(1, "")}  # the second was used last
    manager = mapped(monkeypatch, adapters, (1,), (1,), slots=[1, 2])
    manager.remove_oldest_adapter()
    assert list(manager.list_adapters()) == [1]


# --- heads that would not get their tenants' deltas -----------------------------------------------


def model_config(head_dtype=torch.bfloat16, **config):
    usual = {
        "dtype": torch.bfloat16,
        "head_dtype": head_dtype,
        "enable_sleep_mode": False,
        "enable_prompt_embeds": False,
        "architecture": "TransformersForCausalLM",
        "using_transformers_backend": lambda: False,
        "is_encoder_decoder": False,
        "multimodal_config": None,
        "runner_type": "generate",
    }
    return SimpleNamespace(**usual | config)


def parallel_config(**config):
    return SimpleNamespace(
        **{"enable_batch_sharded_sampling": False, "use_ubatching": False} | config
    )


def managed(monkeypatch, places=(), **config):
    """A manager without what the engine's own constructor makes."""

    def made(self, *args, **kwargs):
        self.places = places

    monkeypatch.setattr(compat.LRUCacheLoRAModelManager, "__init__", made)
    usual = {
        "additional_config": None,
        "lora_config": SimpleNamespace(enable_tower_connector_lora=False),
        "speculative_config": None,
        "use_v2_model_runner": True,
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "parallel_config": parallel_config(),
        "model_config": model_config(),
    }
    return ModelManager(None, vllm_config=SimpleNamespace(**usual | config), device="cpu")


def test_drafted_tokens_of_the_v2_runner_are_refused(monkeypatch):
    drafts = SimpleNamespace(method="ngram")
    with pytest.raises(UnsupportedError, match=r"--speculative-config: .*V2 model runner"):
        managed(monkeypatch, speculative_config=drafts)
    managed(monkeypatch, speculative_config=drafts, use_v2_model_runner=False)
    managed(monkeypatch)


PRUNED = {
    pruned: SimpleNamespace(is_multimodal_pruning_enabled=lambda pruned=pruned: pruned)
    for pruned in (False, True)
}
REFUSED = {
    "--enable-batch-sharded-sampling: ": {
        "parallel_config": parallel_config(enable_batch_sharded_sampling=True)
    },
    "--enable-dbo, --ubatch-size: ": {"parallel_config": parallel_config(use_ubatching=True)},
    "--enable-sleep-mode: ": {"model_config": model_config(enable_sleep_mode=True)},
    "--kv-sharing-fast-prefill: ": {"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)},
    "--video-pruning-rate: ": {"model_config": model_config(multimodal_config=PRUNED[True])},
    "--enable-prompt-embeds: .*V1 model runner": {
        "model_config": model_config(enable_prompt_embeds=True),
        "use_v2_model_runner": False,
    },
    "Whisper: the rows of an encoder": {
        "model_config": model_config(architecture="Whisper", is_encoder_decoder=True)
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_by_name(why, monkeypatch):
    with pytest.raises(UnsupportedError, match=why):
        managed(monkeypatch, **REFUSED[why])


def test_what_is_not_refused(monkeypatch):
    managed(monkeypatch, model_config=model_config(enable_prompt_embeds=True))
    managed(monkeypatch, model_config=model_config(multimodal_config=PRUNED[False]))


def test_what_embeds_text_ahead_of_its_step_is_refused(monkeypatch):
    """vLLM's sources show which models do; Qwen 3 VL does it for pruned videos."""
    folder = Path(inspect.getfile(models)).parent
    call = re.compile(r"get_language_model\(\)\.embed_input_ids\(")
    assert {f.stem for f in folder.glob("*.py") if call.search(f.read_text())} == {
        "molmo2",
        "qwen3_vl",
    }
    for name in EMBEDS_AHEAD:
        with pytest.raises(UnsupportedError, match=f"{name}: embeds text while it encodes"):
            managed(monkeypatch, model_config=model_config(architecture=name))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_a_gpu_without_kernels_is_refused_unless_nothing_is_captured(impl, monkeypatch):
    monkeypatch.setattr(manager_module, "find_places", lambda model: [])
    monkeypatch.setattr(manager_module, "fastest", lambda device: "reference")

    def pool(*args, **kwargs):
        raise NotImplementedError  # what comes next needs a GPU

    monkeypatch.setattr(manager_module, "Pool", pool)
    manager = object.__new__(ModelManager)
    vars(manager).update(
        settings=Settings(impl=impl, slot_bytes=64),
        model=None,
        device="cuda:0",
        lora_config=SimpleNamespace(max_loras=2),
    )
    why = r"8\.0 or newer.* set --enforce-eager"
    for eager, raised, match in ((False, UnsupportedError, why), (True, NotImplementedError, None)):
        manager.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=eager),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        with pytest.raises(raised, match=match):
            manager._create_lora_modules()


def test_the_transformers_backend_is_refused_by_name(monkeypatch):
    theirs = model_config()
    theirs.using_transformers_backend = lambda: True
    with pytest.raises(UnsupportedError, match="--model-impl: TransformersForCausalLM: "):
        managed(monkeypatch, model_config=theirs)


@pytest.mark.parametrize("inner", [False, True])
def test_a_head_made_of_the_bases_is_refused(inner, monkeypatch):
    text = SimpleNamespace(classifier_from_token=["no", "yes"])
    config = SimpleNamespace(get_text_config=lambda: text) if inner else text
    text.get_text_config = lambda: text
    theirs = model_config()
    theirs.hf_config = config
    managed(monkeypatch, model_config=theirs)  # it generates text
    theirs.runner_type = "pooling"
    with pytest.raises(UnsupportedError, match="classifier_from_token: "):
        managed(monkeypatch, model_config=theirs)
    text.classifier_from_token = None
    managed(monkeypatch, model_config=theirs)


def test_graphs_that_were_compiled_without_the_plugin_are_not_found(monkeypatch):
    """vLLM keys its caches by `VllmConfig.compute_hash`, of which this is part."""
    for given in ({}, None, {"deltacome": {"canary": None}}):
        manager = managed(monkeypatch, additional_config=given)
        config = manager.vllm_config.additional_config
        assert config["deltacome_plugin"] == importlib.metadata.version("deltacome")
        assert given is None or config is given  # copies of the configuration share it


def test_a_tenant_that_leaves_a_slot_is_counted_and_an_ordinary_adapter_is_not(monkeypatch):
    def activate(self, id):
        self.lora_index_to_id[0] = id
        return True

    theirs = compat.LRUCacheLoRAModelManager
    monkeypatch.setattr(theirs, "activate_adapter", activate)
    manager = manager_of({1: object(), 2: Tenant(2, ""), 3: object()}, slots=[None])
    manager._fill = lambda slot, tenant: None
    manager.evictions = 0
    evictions = []
    for id in (1, 2, 3, 3):
        manager.activate_adapter(id)
        evictions.append(manager.evictions)
    assert evictions == [0, 0, 1, 1]


def test_a_head_of_another_dtype_is_refused(monkeypatch):
    fine = model_config(torch.float32)
    head, linear = (
        Place(name, nn.Module(), kind, (Part(name, ((0, 64),), (0, 64)),))
        for name, kind in (("lm_head", "head"), ("up_proj", "linear"))
    )
    why = r"lm_head: head_dtype: expected the model's, torch\.bfloat16, got torch\.float32"
    with pytest.raises(UnsupportedError, match=why):
        managed(monkeypatch, [linear, head], model_config=fine)
    managed(monkeypatch, [linear], model_config=fine)  # this worker has no head
    managed(monkeypatch, [linear, head])
