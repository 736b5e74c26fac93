"""Parts of the plugin that need no engine."""

import asyncio
import contextlib
import ctypes
import inspect
import json
import re
import shutil
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from artifact_helpers import PLAN, random_artifact, random_bands
from tiny_pairs import SIZES, make_base, rewrite, weights_of
from torch import nn
from transformers import AutoConfig, LlamaConfig
from typer.testing import CliRunner
from vllm.lora.layers import LoRAMappingType
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor import models
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm_helpers import vllm_parser

import deltacome.vllm
from deltacome.arch.checkpoint import Checkpoint
from deltacome.cli import app
from deltacome.errors import ArtifactError, MismatchError, PlanError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.canary import Canary, canary_ids
from deltacome.format.codec import dense, read_bands, write_bands
from deltacome.format.spec import Band, bands_nbytes
from deltacome.ops.slots import BandTable, PlacedBands
from deltacome.ops.slots import Pool as OpsPool
from deltacome.runtime.base import Base
from deltacome.vllm import compat, plugin, version
from deltacome.vllm import manager as manager_module
from deltacome.vllm.find import Finder, hub_artifact
from deltacome.vllm.launch import Launch, plan_launch
from deltacome.vllm.layers import Delta, install
from deltacome.vllm.manager import ModelManager, WorkerManager, default_slot_bytes
from deltacome.vllm.manners import Manners
from deltacome.vllm.places import Part, Place, find_places
from deltacome.vllm.plugin import register
from deltacome.vllm.refuse import NORM_BEHIND, refuse_options
from deltacome.vllm.request import artifact_path, content_path, has_digest, is_artifact
from deltacome.vllm.settings import Settings
from deltacome.vllm.shard import common_group, shard_bands, shard_signs
from deltacome.vllm.share import worker_nbytes
from deltacome.vllm.step import Step
from deltacome.vllm.tenant import Tenant, load_tenant
from deltacome.vllm.tokenizers import check_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("small", folder, torch.float32)
    return folder


# --- versions ------------------------------------------------------------------------------------


def test_this_vllm_is_known():
    compat.check()


@pytest.mark.parametrize("number", ["0.31.9", "0.34.0", "1.0", "0.34.0rc1", "0.34.0.dev5"])
def test_another_version_is_left_alone_before_it_is_imported(number, monkeypatch):
    told = []
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: number)
    monkeypatch.delattr(deltacome.vllm, "compat")
    monkeypatch.setitem(sys.modules, "deltacome.vllm.compat", None)
    monkeypatch.setattr(plugin.logger, "error", lambda text, *of: told.append(text % of))
    register()
    assert len(told) == 1
    assert re.search(rf"not hooked in.*from 0\.32 on and before 0\.34, got {number}", told[0])


def test_a_vllm_without_hooks_refuses_an_artifact_itself(base, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "check", refuse_all)
    monkeypatch.setattr(plugin.logger, "error", lambda *said: None)
    monkeypatch.setattr(compat.lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", None)
    register()
    assert compat.lora_model_runner_mixin.LRUCacheWorkerLoRAManager is None
    artifact = random_artifact(base, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        PEFTHelper.from_local_dir(str(artifact.path), None)


def refuse_all():
    raise UnsupportedError("another signature")


@pytest.mark.parametrize("number", ["0.32.0", "0.32.1rc1", "0.32.1+cpu", "0.33.0"])
def test_versions_that_are_known(number, monkeypatch):
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: number)
    version.check_version()


def test_another_signature_is_refused_by_name(monkeypatch):
    def _load_adapter(self, lora_request, surprise):
        raise AssertionError

    monkeypatch.setitem(compat.SIGNATURES, _load_adapter, ("self", "lora_request"))
    with pytest.raises(
        UnsupportedError, match=r"_load_adapter: expected parameters .* got .*surprise"
    ):
        compat.check()


def test_a_method_is_wrapped_once():
    class Theirs:
        def add(self, number):
            return number + 1

        @classmethod
        def named(cls, times):
            return times * cls.__name__

        async def later(self):
            return 3

    def twice(original, *args, **kwargs):
        return 2 * original(*args, **kwargs)

    async def twice_later(original, *args):
        return 2 * await original(*args)

    for _ in range(2):  # plugins may be loaded more than once
        compat.wrap(Theirs, "add", twice)
        compat.wrap(Theirs, "named", twice)
        compat.wrap(Theirs, "later", twice_later)
    assert inspect.iscoroutinefunction(Theirs.later)
    assert asyncio.run(Theirs().later()) == 6
    assert Theirs().add(number=1) == 4
    assert Theirs.named(1) == "TheirsTheirs"
    assert list(inspect.signature(Theirs.add).parameters) == ["self", "number"]


# --- settings and names --------------------------------------------------------------------------


def test_settings():
    assert Settings.parse(None) == Settings()
    assert Settings.parse({"other": 1, "deltacome": {"slot_bytes": 7}}).slot_bytes == 7
    with pytest.raises(UnsupportedError, match="'slotbytes'"):
        Settings.parse({"deltacome": {"slotbytes": 7}})
    with pytest.raises(UnsupportedError, match=r"slot_bytes: expected int \| None, got '7'"):
        Settings.parse({"deltacome": {"slot_bytes": "7"}})
    with pytest.raises(UnsupportedError, match="signs"):
        Settings.parse({"deltacome": {"signs": 1}})
    assert Settings.parse({"deltacome": {"canary": None}}).canary is None
    assert Settings.parse({"deltacome": {"canary": 1}}).canary == 1
    with pytest.raises(UnsupportedError, match=r"canary: expected float .*got True"):
        Settings.parse({"deltacome": {"canary": True}})
    with pytest.raises(UnsupportedError, match="deltacome: expected an object, got 3"):
        Settings.parse({"deltacome": 3})


def test_a_path_says_what_its_folder_holds(base, tmp_path):
    random_artifact(base, tmp_path / "a", seed=1)
    first = content_path(str(tmp_path / "a"))
    assert artifact_path(first) == str(tmp_path / "a")
    assert has_digest(first)
    assert not has_digest(str(tmp_path / "a"))
    assert content_path(first) == first
    assert is_artifact(first)
    assert not is_artifact(str(base))
    random_artifact(base, tmp_path / "b", seed=2)
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    assert content_path(first) != first


# --- shards --------------------------------------------------------------------------------------

CUTS = {
    "all": ([(0, 320)], (0, 256)),
    "rows of a group": ([(0, 128)], (0, 256)),
    "rows within a group": ([(192, 320)], (0, 256)),
    "columns": ([(0, 320)], (128, 256)),
    "two runs": ([(64, 128), (192, 320)], (0, 256)),
}


@pytest.mark.parametrize("cut", CUTS)
def test_shards_are_the_same_bytes(cut):
    """A shard decodes to exactly its rows and columns of the decoded whole."""
    rows, columns = CUTS[cut]
    blob = write_bands(random_bands((320, 256), PLAN, 128))
    whole = dense(read_bands(blob, (320, 256), PLAN, 128))
    group = common_group(128, [rows, [columns]])
    shard = shard_bands("w", blob, (320, 256), PLAN, 128, rows, columns, group)
    expected = torch.cat([whole[a:b] for a, b in rows])[:, slice(*columns)]
    got = dense(read_bands(shard, tuple(expected.shape), PLAN, group))
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    if cut == "all":
        assert shard is blob


def test_shards_that_cut_a_block_are_refused():
    blob = write_bands(random_bands((320, 256), PLAN, 128))
    rows = [(0, 160)]
    group = common_group(128, [[(160, 320)]])
    with pytest.raises(UnsupportedError, match="w: tensor parallelism cuts it at 0 and 160 of 320"):
        shard_bands("w", blob, (320, 256), PLAN, 128, rows, (0, 256), group)


def test_shards_that_cut_a_block_have_groups_that_kernels_take():
    """With a vocabulary of 32,000 on eight workers the second begins at 4,000, in 16-bit bands only."""
    cut = Place("w", nn.Module(), "head", (Part("w", ((4000, 8000),), (0, 64)),))
    assert cut.group(128) == 64
    plan = (Band(16, 2),)
    blob = write_bands(random_bands((8192, 64), plan, 128))
    shard = shard_bands("w", blob, (8192, 64), plan, 128, [(4000, 8000)], (0, 64), 64)
    whole = dense(read_bands(blob, (8192, 64), plan, 128))
    assert torch.equal(dense(read_bands(shard, (4000, 64), plan, 64)), whole[4000:8000])
    blob = write_bands(random_bands((8192, 64), (Band(2, 2),), 128))
    with pytest.raises(UnsupportedError, match="cuts it at 4000 and 8000 of 8192"):
        shard_bands("w", blob, (8192, 64), (Band(2, 2),), 128, [(4000, 8000)], (0, 64), 64)
    assert common_group(32, [[(4016, 8032)]]) == 32
    assert common_group(96, [[(192, 384)]]) == 96
    # Beside such a shard another may be whole, or begin where a block does.
    assert common_group(128, [[(96, 192)], [(0, 320)], [(192, 320)]]) == 64
    blob = write_bands(random_bands((320, 64), PLAN, 128))
    whole = dense(read_bands(blob, (320, 64), PLAN, 128))
    for start in (0, 192):
        shard = shard_bands("w", blob, (320, 64), PLAN, 128, [(start, 320)], (0, 64), 64)
        got = dense(read_bands(shard, (320 - start, 64), PLAN, 64))
        assert torch.allclose(got, whole[start:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [320, 300])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_vocabulary_that_is_cut_within_a_block(vocabulary, rank):
    """Each of two workers has 160 of 320 rows (300 padded by vLLM), and begins or ends within a block."""
    cut = compat.VocabParallelEmbedding._get_indices(320, 320, vocabulary, vocabulary, rank, 2)
    start, stop = cut.org_vocab_start_index, cut.org_vocab_end_index
    sizes = {"embedding_dim": 64, "org_vocab_size": vocabulary}
    weight = torch.zeros(160, 64)
    quant = UnquantizedEmbeddingMethod()
    model = nn.Module()
    model.config = SimpleNamespace(tie_word_embeddings=False)
    model.head = module(
        compat.ParallelLMHead, shard_indices=cut, weight=weight, quant_method=quant, **sizes
    )
    (place,) = find_places(model)
    (part,) = place.parts
    blob = write_bands(random_bands((vocabulary, 64), PLAN, 128))
    whole_OI = dense(read_bands(blob, (vocabulary, 64), PLAN, 128))
    group = place.group(128)
    shard = shard_bands("w", blob, (vocabulary, 64), PLAN, 128, part.rows, part.columns, group)
    pool = OpsPool(1, shard.numel())
    step = Step(1, 4, torch.device("cpu"))
    delta = install(place, pool, step, "reference", replace(Settings(), max_bands=len(PLAN)))
    pool.load(0, 0, shard)
    delta.bands.load(0, [PlacedBands(0, PLAN)])
    step.set([0, -1, 0], [0, -1, 0])
    x, y = torch.randn(3, 64), torch.ones(3, 160)
    delta.add(y, x, biased=False)
    expected = torch.ones(3, 160)
    expected[::2, : stop - start] += x[::2] @ whole_OI[start:stop].T
    torch.testing.assert_close(y, expected)
    ids, rows = torch.tensor([0, 3, stop - start - 1]), torch.zeros(3, 64)
    delta.add_rows(rows, ids)
    torch.testing.assert_close(rows[::2], whole_OI[start:stop][ids[::2]])
    assert not rows[1].any()


# --- rows ----------------------------------------------------------------------------------------


def test_rows_of_a_prompts_logprobs():
    """The head's rows are matched to their tokens, wherever the engine's view of them begins."""
    step = Step(4, 16, torch.device("cpu"))
    step.set([2, 2, 2, -1, -1, 0, 0, 0], [2, -1, 0])
    assert not step.idle
    buffer = torch.randn(14, 5)
    hidden = buffer[2:12]  # hidden states may themselves be a view into a buffer
    assert step.sampled(hidden[:3]).slot_T.tolist() == [2, -1, 0]
    with Step.prompt_logits(hidden):
        assert step.sampled(hidden[3:7]).slot_T.tolist() == [-1, -1, 0, 0]
        assert step.sampled(hidden[0:2]).slot_T.tolist() == [2, 2]
        assert step.sampled(hidden[9:10]).slot_T.tolist() == [-1]
        for other in (hidden[3:7].clone(), hidden[:4, 1:], hidden[::2], hidden.new_empty(11, 5)):
            with pytest.raises(MismatchError, match="expected a run of the 10 hidden states, got"):
                step.sampled(other)
        beyond = buffer[9:13]
        with pytest.raises(MismatchError, match="got 4 rows that lie 140 bytes behind the first"):
            step.sampled(beyond)
    assert step.sampled(hidden[:3]).slot_T.tolist() == [2, -1, 0]
    step.set([-1, -1], [-1])
    assert step.idle
    assert step.tokens(8).slot_T.tolist() == [-1] * 8


# --- places and tenants --------------------------------------------------------------------------


def module(kind=nn.Module, **attributes):
    """One of vLLM's modules, without the worker groups that its constructor needs."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    vars(made).update(attributes)
    return made


def linear():
    sizes = {"input_size": 64, "output_size": 96, "tp_rank": 0, "tp_size": 1}
    return module(compat.ReplicatedLinear, **sizes)


class Seeing(nn.Module):
    """A model that takes images."""

    supports_multimodal = True

    def __init__(self):
        super().__init__()
        self.visual = nn.ModuleDict({"merger": linear(), "fc": linear()})
        self.projector = linear()
        self.language_model = nn.ModuleDict({"fc": linear()})


MAPPING = {
    "tower_model": ["visual."],
    "connector": ["visual.merger.", "projector"],
    "generator": [],
}


def test_what_encodes_images_has_no_place():
    model = Seeing()
    with pytest.raises(UnsupportedError, match="Seeing: takes more than text, and names no tower"):
        find_places(model)
    model.get_mm_mapping = lambda: SimpleNamespace(**MAPPING)
    assert [place.name for place in find_places(model)] == ["language_model.fc"]
    del model.get_mm_mapping
    model._tower_model_names = ["visual", "projector"]
    assert [place.name for place in find_places(model)] == ["language_model.fc"]
    model.supports_multimodal = False
    assert len(find_places(model)) == 4


def embedding(kind, weight):
    indices = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=len(weight))
    sizes = {"embedding_dim": weight.shape[1], "org_vocab_size": len(weight)}
    return module(kind, shard_indices=indices, weight=weight, **sizes)


def test_a_head_is_tied_to_the_embedding_whose_weight_it_has():
    """Gemma's E models have a second embedding, for their layers."""
    layers, tokens = torch.zeros(8, 16), torch.zeros(8, 4)
    model = nn.Module()
    model.config = SimpleNamespace(tie_word_embeddings=True)
    model.per_layer = embedding(compat.VocabParallelEmbedding, layers)
    model.embed = embedding(compat.VocabParallelEmbedding, tokens)
    model.lm_head = embedding(compat.ParallelLMHead, tokens)
    *_, head = find_places(model)
    assert (head.kind, head.tied, head.parts[0].name) == ("head", True, "embed")
    model.lm_head = embedding(compat.ParallelLMHead, torch.zeros(8, 4))
    with pytest.raises(UnsupportedError, match=r"lm_head: expected the weight of per_layer, embed"):
        find_places(model)
    del model.per_layer, model.embed  # on another stage
    (head,) = find_places(model)
    assert head.parts[0].name == "lm_head"


class Pool(compat.Pooler):
    def get_supported_tasks(self):
        raise NotImplementedError

    def forward(self, hidden_states, pooling_metadata):
        raise NotImplementedError


def test_what_a_pooler_calls_has_no_place(base, tmp_path):
    """Its rows are requests; the slots of as many tokens would belong to other requests."""
    model = nn.Module()
    model.config = SimpleNamespace(tie_word_embeddings=False)
    model.fc, model.score = linear(), linear()
    model.pooler = module(Pool, head=nn.ModuleDict({"classifier": model.score}))
    model.pooler._modules["head"] = model.pooler.head
    assert [place.name for place in find_places(model)] == ["fc"]
    del model.pooler
    assert [place.name for place in find_places(model)] == ["fc", "score"]


def test_rows_of_an_encoder_are_not_the_batchs(monkeypatch):
    seen = []
    theirs = compat.LRUCacheLoRAModelManager
    monkeypatch.setattr(theirs, "_set_adapter_mapping", lambda self, mapping: seen.append(mapping))
    manager = object.__new__(ModelManager)
    manager.lora_index_to_id, manager.list_adapters = [7, None], lambda: {7: Tenant(7, "")}
    manager.step = Step(2, 4, torch.device("cpu"))
    manager._set_adapter_mapping(compat.LoRAMapping((7, 7, 0), (7, 0)))
    tower = LoRAMappingType.TOWER
    manager._set_adapter_mapping(compat.LoRAMapping((0, 7) * 9, (0,) * 9, type=tower))
    assert manager.step.tokens(4).slot_T.tolist() == [0, 0, -1, -1]
    assert [mapping.index_mapping for mapping in seen] == [(0,) * 3, (0,) * 18]


def test_adapters_of_towers_are_refused_by_name():
    lora = SimpleNamespace(enable_tower_connector_lora=True)
    of_text = SimpleNamespace(
        using_transformers_backend=lambda: False,
        is_encoder_decoder=False,
        runner_type="generate",
        architecture="Llama",
    )
    config = SimpleNamespace(additional_config=None, lora_config=lora, model_config=of_text)
    with pytest.raises(UnsupportedError, match="--enable-tower-connector-lora: "):
        ModelManager(None, vllm_config=config, device="cpu")


def test_a_norm_of_sampled_rows_is_refused_by_name():
    """vLLM's sources show which models have one."""
    folder = Path(inspect.getfile(models)).parent
    has = {
        file.stem
        for file in folder.glob("*.py")
        for logits in re.findall(
            r"def compute_logits\(.*?(?=\n    def |\nclass |\Z)", file.read_text(), re.DOTALL
        )
        if ".norm(" in logits
    }
    assert has == {"mimo", "step3p5"}
    for name in NORM_BEHIND:
        mimo = SimpleNamespace(using_transformers_backend=lambda: False, architecture=name)
        with pytest.raises(UnsupportedError, match=f"{name}: vLLM takes its last norm"):
            refuse_options(SimpleNamespace(model_config=mimo))


def loaded(base, artifact, model=None, without=(), **settings):
    """The tenant that a worker makes from an artifact; each tensor has its own module."""
    model = model or nn.Module()
    model.config = AutoConfig.from_pretrained(base)
    places = []
    for tensor, info in Checkpoint(base).tensors.items():
        name, (rows, *columns) = tensor.removesuffix(".weight"), info.shape
        kind = "linear" if columns else "norm"
        kind = {"lm_head": "head", "model.embed_tokens": "embedding"}.get(name, kind)
        part = Part(name, ((0, rows),), (0, *(columns or [1])))
        if not name.startswith(without):
            places.append(Place(name, nn.Module(), kind, (part,)))
    settings = Settings(group_size=32, **settings)
    return load_tenant(1, str(artifact.path), model, places, Base(base), settings)


def extended(base, folder, **tensors):
    """A copy of a base with tensors added or replaced; None removes one."""
    shutil.copytree(base, folder)
    weights = weights_of(base) | {name.replace("__", "."): value for name, value in tensors.items()}
    rewrite(folder, {name: w for name, w in weights.items() if w is not None}, dtype=None)
    return folder


def test_a_bases_fingerprints_are_read_once(base, tmp_path, monkeypatch):
    artifacts = [random_artifact(base, tmp_path / name) for name in "ab"]
    asked, sample = [], Checkpoint.sample
    monkeypatch.setattr(
        Checkpoint, "sample", lambda self, name: (asked.append(name), sample(self, name))[1]
    )
    read = Base(base)
    for artifact in artifacts:
        read.check(artifact)
    assert sorted(asked) == list(read.tensors)


def test_a_tenant(base, tmp_path):
    tenant = loaded(base, random_artifact(base, tmp_path / "a"))
    tensors = Checkpoint(base).tensors
    matrices = {name.removesuffix(".weight") for name in tensors if "norm" not in name}
    assert set(tenant.bands) == matrices
    assert len(tenant.norms) == len(tensors) - len(matrices)


def test_a_tenant_whose_tables_nobody_worked_out_is_not_the_base():
    table = BandTable(OpsPool(1, 1024), 64, [64], max_bands=1)
    delta = Delta(Step(1, 4, torch.device("cpu")), table, None, None, False, "reference")
    place = Place("m", nn.Module(), "linear", (Part("m", ((0, 64),), (0, 64)),))
    tenant = Tenant(1, "folder", nbytes=64, bands={"m": [PlacedBands(0, (Band(1, 1),))]})
    with pytest.raises(KeyError):
        delta.load(0, tenant, place)
    manager = object.__new__(ModelManager)
    vars(manager).update(pool=table.pool, places=[place], deltas={"m": delta})
    with pytest.raises(ArtifactError, match=r"folder: has 9999 bytes .* set slot_bytes to 9999"):
        manager.tables(replace(tenant, nbytes=9999))
    longer = {"m": [PlacedBands(0, (Band(1, 1), Band(2, 1)))]}
    with pytest.raises(PlanError, match=r"folder: m: .* set max_bands or max_rank"):
        manager.tables(replace(tenant, bands=longer))
    tenant.fields = manager.tables(tenant)
    delta.load(0, tenant, place)
    assert torch.equal(table.fields_SPBF[0], tenant.fields["m"])
    assert table.fields_SPBF.any()


@pytest.fixture
def registered(monkeypatch):
    """A stand-in for CUDA: the memory it has registered, and the calls it got, in order."""
    pages, told = {}, []

    def register(pointer, nbytes):
        told.append("register")
        return bool(pages.setdefault(pointer, nbytes))

    def unregister(pointer):
        ctypes.string_at(pointer, pages.pop(pointer))  # it is still mapped
        told.append("unregister")

    @contextlib.contextmanager
    def device(one):
        told.append(str(one))
        yield

    monkeypatch.setattr(compat, "host_register", register)
    monkeypatch.setattr(compat, "host_unregister", unregister)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    return pages, told


def gathered(device):
    chunk = torch.arange(50, dtype=torch.uint8)
    tenant = Tenant(1, "", [(0, chunk), (64, chunk)], nbytes=128)
    tenant.gather(torch.device(device))
    assert tenant.image[:50].equal(chunk)
    assert tenant.image[64:114].equal(chunk)
    assert (len(tenant.image), int(tenant.image[50:64].max())) == (128, 0)
    return tenant


def test_a_tenants_memory_is_registered_while_it_is_there(registered):
    """torch's own pinned memory comes in powers of two and is never freed."""
    pages, told = registered
    tenant = gathered("cuda:1")
    assert pages == {tenant.image.data_ptr(): 128}
    image = tenant.image  # held by a copy that has just begun
    del tenant
    assert told == ["cuda:1", "register", "cuda:1", "wait", "unregister"]
    assert image.any()
    told.clear()
    gathered("cpu")
    Tenant(1, "").gather(torch.device("cuda:1"))  # which has nothing packed
    assert told == []


def test_a_dropped_tenants_memory_goes_in_the_thread(registered, monkeypatch):
    """There the wait for the GPU does not hold up the engine's next step."""
    threads = []
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda: threads.append(threading.current_thread().name)
    )
    reading = Future()
    reading.set_result(gathered("cuda:0"))
    held = {1: reading.result()}
    worker, manager = object.__new__(WorkerManager), object.__new__(ModelManager)
    vars(manager).update(remove_adapter=held.pop)
    vars(worker).update(
        _adapter_manager=manager,
        _held={1: manager_module.Held("p", reading)},
        _thread=ThreadPoolExecutor(1, thread_name_prefix="reads"),
    )
    del reading
    worker.drop(1)
    worker._thread.shutdown()
    assert (threads, registered[0]) == (["reads_0"], {})


def test_memory_that_cannot_be_registered_is_taken_as_it_is(registered, monkeypatch):
    monkeypatch.setattr(compat, "host_register", lambda pointer, nbytes: False)
    gathered("cuda:0")
    assert "unregister" not in registered[1]


def test_a_tuned_tower_is_refused(base, tmp_path):
    seeing = extended(base, tmp_path / "seeing", visual__fc__weight=torch.randn(96, 64))
    model = Seeing()
    model.get_mm_mapping = lambda: SimpleNamespace(**MAPPING)
    artifact = random_artifact(seeing, tmp_path / "a")
    why = r"1 tensors .* no place in Seeing .*visual\.fc\.weight; images and sound are encoded by"
    with pytest.raises(MismatchError, match=why):
        loaded(seeing, artifact, model, ("visual",))
    same = random_artifact(seeing, tmp_path / "b", same=("visual.fc.weight",))
    assert "visual.fc" not in loaded(seeing, same, model, ("visual",)).bands


def test_a_head_that_only_the_tuned_model_ties_is_refused(base, tmp_path):
    artifact = random_artifact(base, tmp_path / "a", tie=True)
    with pytest.raises(UnsupportedError, match=r"tie_word_embeddings: .* head of its own"):
        loaded(base, artifact)


def test_what_the_tuned_model_lacks_is_refused(base, tmp_path):
    less = extended(base, tmp_path / "less", model__layers__1__mlp__up_proj__weight=None)
    artifact = random_artifact(less, tmp_path / "a")
    with pytest.raises(MismatchError, match=r"lacks 1 of the base's .*1\.mlp\.up_proj\.weight"):
        loaded(base, artifact)


def test_a_folder_that_is_replaced_while_it_is_read_is_refused(base, tmp_path, monkeypatch):
    """Its new weights would be served as the old ones, whose blocks are in the prefix cache."""
    for i, name in enumerate("ab"):
        random_artifact(base, tmp_path / name, seed=i)
    path = content_path(str(tmp_path / "a"))

    def load(id, folder, *rest):
        (tmp_path / "a").rename(tmp_path / "old")
        (tmp_path / "b").rename(tmp_path / "a")
        Artifact.open(folder)
        return Tenant(id, folder)

    monkeypatch.setattr(manager_module, "load_tenant", load)
    worker = object.__new__(WorkerManager)
    worker._adapter_manager = object.__new__(ModelManager)
    vars(worker._adapter_manager).update(places=[], base=None, settings=None, model=None)
    with pytest.raises(MismatchError, match=r"a: holds other weights than .*/a#deltacome-"):
        worker._read(1, path)


def test_a_base_of_its_own_has_not_the_served_models_revision(base, monkeypatch):
    asked = []
    monkeypatch.setattr(manager_module, "Base", lambda *args: asked.append(args))
    monkeypatch.setattr(manager_module, "find_places", lambda model: [])
    for own in (None, "org/base@v2"):
        served = object.__new__(ModelManager)
        config = SimpleNamespace(
            model_config=SimpleNamespace(model="org/quantised", revision="v1"),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
        )
        vars(served).update(
            settings=Settings(lora=False, base=own, slot_bytes=64),
            vllm_config=config,
            model=None,
            device="cpu",
            lora_config=SimpleNamespace(max_loras=2),
            max_num_batched_tokens=8,
        )
        served._create_lora_modules()
    assert asked == [("org/quantised", "v1"), ("org/base@v2", None)]


# --- what a tuned model carries beside its weights ------------------------------------------------


def manners(base, folder, **files):
    made = {
        name.replace("_json", ".json").replace("_jinja", ".jinja"): c for name, c in files.items()
    }
    vocabulary = {"<end>": 0, "<stop>": 9, "<beyond>": 300}
    return Manners.read(random_artifact(base, folder, files=made), vocabulary, 300)


def test_manners(base, tmp_path):
    assert manners(base, tmp_path / "a") == Manners()
    found = manners(
        *(base, tmp_path / "b"),
        chat_template_jinja=b"{{ x }}",
        generation_config_json=b'{"eos_token_id": [4, 5], "temperature": 0.2, "top_k": null}',
        tokenizer_config_json=b'{"eos_token": {"content": "<stop>"}, "chat_template": "other"}',
    )
    special = {"eos_token": "<stop>"}
    assert found == Manners("{{ x }}", {"temperature": 0.2}, frozenset({4, 5, 9}), special)
    named = b'{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}'
    assert manners(base, tmp_path / "c", tokenizer_config_json=named).template == "d"
    beyond = b'{"eos_token": "<beyond>"}'  # id 300, which no answer of the model has
    assert manners(base, tmp_path / "d", tokenizer_config_json=beyond).ends == frozenset()
    fine = {"temperature": 1, "top_k": 50, "top_p": 0.9, "eos_token_id": 299, "max_length": "x"}
    found = manners(base, tmp_path / "e", generation_config_json=json.dumps(fine).encode())
    assert found.sampling == {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    assert type(found.sampling["temperature"]) is float
    assert found.ends == {299}


def test_end_tokens_of_a_model_without_a_generation_configuration(base, tmp_path):
    for config, ends in (({"eos_token_id": [7, 8]}, {7, 8}), ({"eos_token_id": None}, set())):
        artifact = random_artifact(base, tmp_path / f"{len(ends)}", **config)
        assert Manners.read(artifact, {}, 300).ends == set()  # the base's file may apply to it too
        dropped = ("generation_config.json",)
        artifact.manifest = replace(artifact.manifest, dropped_files=dropped)
        assert Manners.read(artifact, {}, 300).ends == ends
        assert Manners.read(artifact, {}, 300).sampling is None


WRONG = {
    '{"temperature": true}': "temperature: expected a finite number, got True",
    '{"temperature": NaN}': "temperature: expected a finite number, got nan",
    '{"repetition_penalty": 1%s}' % ("0" * 400): "repetition_penalty: expected a finite number",
    '{"temperature": 3}': "temperature: temperature must be in",
    '{"top_p": 0}': r"top_p: top_p must be in \(0, 1\]",
    '{"top_k": 5.0}': r"top_k: expected a whole number .*, got 5\.0",
    '{"top_k": 4294967296}': "top_k: expected a whole number from -1 to 2147483647",
    '{"min_p": "0.1"}': "min_p: expected a finite number, got '0.1'",
    '{"eos_token_id": 5.0}': r"eos_token_id: expected numbers of tokens, from 0 to 299, got 5\.0",
    '{"eos_token_id": [true]}': "eos_token_id: expected numbers .* got True",
    '{"eos_token_id": [4, [5]]}': r"eos_token_id: expected numbers .* got \[5\]",
    '{"eos_token_id": [4, 300]}': "eos_token_id: expected numbers .* got 300",
    '{"eos_token_id": -1}': "eos_token_id: expected numbers .* got -1",
    json.dumps({"eos_token_id": [*range(65)]}): "eos_token_id: expected at most 64 tokens, got 65",
}


@pytest.mark.parametrize("content", WRONG, ids=lambda content: content[:30])
def test_a_generation_configuration_that_is_wrong(content, base, tmp_path):
    """In the engine it would end the thread that reads requests, or a step."""
    with pytest.raises(ArtifactError, match=f"a: generation_config.json: {WRONG[content]}"):
        manners(base, tmp_path / "a", generation_config_json=content.encode())


def test_a_template_that_is_none(base, tmp_path):
    with pytest.raises(ArtifactError, match=r"a: chat_template\.jinja: expected UTF-8, got b'"):
        manners(base, tmp_path / "a", chat_template_jinja=b"{{ \xff }}")
    for i, template in enumerate((5, {"a": "b"}, [{"name": "default"}])):
        content = json.dumps({"chat_template": template}).encode()
        with pytest.raises(ArtifactError, match=r"chat_template: expected text, or a list with"):
            manners(base, tmp_path / f"b{i}", tokenizer_config_json=content)
    nameless = json.dumps({"chat_template": [{"template": "x"}, "y"]}).encode()
    assert manners(base, tmp_path / "c", tokenizer_config_json=nameless).template is None


def test_another_way_to_begin_a_text_is_another_tokenizer(base, tmp_path):
    """`tokenizer.json` can be the same; where the tuned configuration is silent, that file decides."""
    ours = tmp_path / "base"
    shutil.copytree(base, ours)

    def check(theirs, tuned):
        (ours / "tokenizer_config.json").write_text(json.dumps(theirs))
        files = {"tokenizer_config.json": json.dumps(tuned).encode()}
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        check_tokenizer(random_artifact(base, tmp_path / "a", files=files), ours)

    for theirs, tuned in ((False, True), (True, False), (None, True)):
        for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
            with pytest.raises(
                UnsupportedError, match=rf"{key}: expected the base's, .*got {tuned}"
            ):
                check({key: theirs}, {key: tuned})
    for theirs, tuned in ((True, True), (True, None), (None, False)):
        check({"add_bos_token": theirs}, {"add_bos_token": tuned})


def test_canary():
    canary = Canary((1, 2, 3), (-1.0, -2.5))
    assert Canary.from_json(canary.to_json()) == canary
    assert canary.distance([-1.0, -2.5]) == 0
    assert canary.distance([-1.0, -3.5]) == pytest.approx(0.5**0.5)
    assert canary_ids(50) == canary_ids(50)
    assert max(canary_ids(7)) < 7
    for content in (b"{", b"[]", b'{"ids": [1, 2]}', b'{"ids": [1, 2], "logprobs": [-1, -2]}'):
        with pytest.raises(ArtifactError, match="ids and"):
            Canary.from_json(content)
    with pytest.raises(ArtifactError, match="finite"):
        Canary.from_json(b'{"ids": [1, 2], "logprobs": [NaN]}')


# --- finding -------------------------------------------------------------------------------------


@pytest.fixture
def memory(base, tmp_path):
    """An fsspec location that holds one artifact."""
    random_artifact(base, tmp_path / "a", seed=1)
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "a"), "/bucket/tenants/math", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def test_found_in_a_remote_place(memory, base, tmp_path):
    finder = Finder("memory://bucket/tenants", tmp_path / "cache")
    folder = asyncio.run(finder.find("math"))
    assert content_path(str(folder)).endswith(content_path(str(tmp_path / "a")).rpartition("#")[2])
    assert asyncio.run(finder.find("math")) == folder  # and is not copied again
    assert asyncio.run(finder.find("nobody")) is None
    random_artifact(base, tmp_path / "b", seed=2)
    memory.put(f"{tmp_path / 'b'}/", "/bucket/tenants/math", recursive=True)
    other = asyncio.run(finder.find("math"))
    assert other != folder
    assert folder.is_dir()
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_place_that_cannot_be_read(tmp_path, memory, monkeypatch):
    with pytest.raises(ArtifactError) as refused:
        asyncio.run(Finder("nowhere://user:password@x", tmp_path).find("math"))
    # A client is not told the address; the log has the rest.
    assert str(refused.value) == "math: cannot be read from where tenants are looked for"
    assert "nowhere" in str(refused.value.__cause__)

    def broken(*args, **kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr(type(memory), "get_file", broken)
    with pytest.raises(ArtifactError, match=r"^math: cannot be read") as refused:
        asyncio.run(Finder("memory://bucket/tenants", tmp_path / "cache").find("math"))
    assert str(refused.value.__cause__) == "the line is dead"
    assert not list((tmp_path / "cache").glob("*"))


def test_an_upload_that_still_runs(base, tmp_path, memory):
    memory.mv("/bucket/tenants/math", "/bucket/whole", recursive=True)
    memory.copy("/bucket/whole/delta_config.json", "/bucket/tenants/math/delta_config.json")
    finder = Finder("memory://bucket/tenants", tmp_path / "cache")
    with pytest.raises(ArtifactError, match=r"^math: not complete yet.* is missing"):
        asyncio.run(finder.find("math"))
    assert not list((tmp_path / "cache").iterdir())
    (shard,) = (name for name in memory.find("/bucket/whole") if name.endswith(".safetensors"))
    for name in memory.find("/bucket/whole"):
        memory.copy(name, name.replace("/whole/", "/tenants/math/"))
    content = memory.cat_file(shard)
    memory.pipe_file(shard.replace("/whole/", "/tenants/math/"), content[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"not complete yet.*expected SHA-256"):
        asyncio.run(finder.find("math"))
    memory.copy(shard, shard.replace("/whole/", "/tenants/math/"))
    Artifact.open(asyncio.run(finder.find("math"))).check_bytes()


def test_who_comes_together_copies_once(base, tmp_path, monkeypatch):
    """In one server; of two, the first copy stays. (Files in fsspec's memory are not thread-safe.)"""
    random_artifact(base, tmp_path / "tenants" / "math", seed=1)
    place = f"file://{tmp_path / 'tenants'}"
    system = type(fsspec.filesystem("file"))
    copied, copy = [], system.get_file

    def counted(self, source, target, **kwargs):
        copied.append(source)
        copy(self, source, target, **kwargs)

    monkeypatch.setattr(system, "get_file", counted)

    async def together(*finders):
        return await asyncio.gather(*(finder.find("math") for finder in finders))

    finder = Finder(place, tmp_path / "one")
    assert len({*asyncio.run(together(*[finder] * 5))}) == 1
    assert len(copied) == len({*copied})

    both = threading.Barrier(2)

    def late(self, source, target, **kwargs):
        if source.endswith(".safetensors"):
            both.wait(20)  # neither is there when the other looks
        copy(self, source, target, **kwargs)

    monkeypatch.setattr(system, "get_file", late)
    servers = [Finder(place, tmp_path / "two") for _ in range(2)]
    (folder,) = {*asyncio.run(together(*servers))}
    assert list((tmp_path / "two").iterdir()) == [folder]
    Artifact.open(folder).check_bytes()


@pytest.mark.parametrize("name", ["..", "a/b", "/etc", ".hidden", "", "a\n", "x" * 129])
def test_names_are_one_component(name, tmp_path):
    assert asyncio.run(Finder(str(tmp_path)).find(name)) is None


def test_an_artifact_named_on_the_hub(base, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact = random_artifact(base, tmp_path / "mine")
    artifact.push_to_hub("org/delta", branch="v1")
    folder = Path(hub_artifact("org/delta@v1"))
    assert Artifact.open(folder).digest == artifact.digest
    hub.repos["org/lora"] = type(hub.repos["org/delta"])(private=False)
    (tmp_path / "org" / "local").mkdir(parents=True)
    for other in ("org/delta", "org/lora", "org/none", "org/local", "/no/folder", "gpt2", ""):
        assert hub_artifact(other) == other
    repo = hub.repos["org/delta"]
    files = repo.commits[repo.branches["v1"]]
    repo.commit("broken", {k: v for k, v in files.items() if not k.endswith(".safetensors")})
    with pytest.raises(ArtifactError, match="is missing"):
        Artifact.open(hub_artifact("org/delta@broken"))
    repo.commit("more", files | {"notes.txt": b"what no manifest names"})
    assert not (Path(hub_artifact("org/delta@more")) / "notes.txt").exists()


# --- launching -----------------------------------------------------------------------------------

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def launched(base, tenants, **options):
    launch = plan_launch(str(base), tenants, **options)
    at = launch.command.index("--additional-config")
    return launch, json.loads(launch.command[at + 1])["deltacome"]


def test_launch_sets_what_tenants_need(base, tmp_path):
    small = random_artifact(base, tmp_path / "t" / "small", plan=(Band(8, 1),))
    large = random_artifact(base, tmp_path / "t" / "large", plan=(Band(8, 9),), terms="mixed")
    launch, settings = launched(base, {"s": str(small.path)})
    assert settings["slot_bytes"] < 20_000
    assert settings["group_size"] == 32
    assert settings["signs"] is False
    both, more = launched(base, {"s": str(small.path)}, folder=str(tmp_path / "t"), lora=True)
    assert more["slot_bytes"] > 2 * settings["slot_bytes"]
    assert more["signs"] is True
    assert more["tenants"] == str(tmp_path / "t")
    assert more["max_rank"] >= 27
    assert launch.command[launch.command.index("--max-loras") + 1] == "1"
    assert both.command[both.command.index("--max-loras") + 1] == "4"  # more may come
    assert f"s={small.path}" in both.command
    assert launch.environment == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    assert large.path.name not in str(launch)


SHARED = {
    **SIZES,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
}


def share(artifact, rank, size):
    """Bytes of each tensor's shards on worker `rank` of `size`, as vLLM shards a Llama."""
    nbytes = {}
    for name, record in artifact.manifest.records.items():
        if not record.packed:
            continue
        shape, leaf = record.shape, name.split(".")[-2]
        rows, columns = [(0, shape[0])], (0, shape[1])
        if leaf in ("o_proj", "down_proj"):
            columns = (rank * shape[1] // size, (rank + 1) * shape[1] // size)
        else:
            count = min(size, 2) if leaf in ("k_proj", "v_proj") else size  # workers share heads
            step, which = shape[0] // count, rank * count // size
            rows = [(which * step, (which + 1) * step)]
        kinds = artifact.manifest.group_size, rows, columns
        group = common_group(kinds[0], [rows, [columns]])
        blobs = []
        if record.plan:
            blob = artifact.blob(name)
            blobs.append(shard_bands(name, blob, shape, record.plan, *kinds, group))
        if scales := record.sign_scales:
            blobs.append(
                shard_signs(name, artifact.blob(name, "signs"), shape, scales, rows, columns)
            )
        nbytes[name] = sum(blob.numel() for blob in blobs)
    return nbytes


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_workers_share_fits(size, stages, tmp_path, monkeypatch):
    """No worker has more than is reserved, and more workers reserve less."""
    make_base("shared", tmp_path, torch.float32, {"shared": lambda: LlamaConfig(**SHARED)})
    artifact = random_artifact(tmp_path, tmp_path / "a", group_size=128, terms="mixed")
    config = AutoConfig.from_pretrained(tmp_path)
    bound = worker_nbytes(artifact, config, size, stages)
    for rank in range(size):
        held = share(artifact, rank, size)
        first = {
            name: n for name, n in held.items() if "layers.2." not in name and "lm_head" not in name
        }
        assert sum((held if stages == 1 else first).values()) <= bound
    whole = worker_nbytes(artifact, config, 1, 1)
    assert whole == sum(share(artifact, 0, 1).values())
    assert (bound < 0.95 * whole) == (size * stages > 1)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,1")
    assert worker_nbytes(artifact, config, size, stages) == worker_nbytes(artifact, config, size, 1)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["rows", "columns", "head"])
def test_a_slot_has_room_for_a_worker_s_part_of_a_sixteenth(kind, workers):
    matrices = [(4096, 512), (1024, 1024)] if kind == "head" else [(256, 1024), (1024, 256)]
    needed, places = 0, []
    for rows, columns in matrices:
        directions = 2 * rows * columns // 16 // (rows + columns)
        assert bands_nbytes((rows, columns), (Band(8, directions),)) == pytest.approx(
            2 * rows * columns / 16, rel=0.1
        )
        if kind == "columns":
            columns //= workers
        else:
            rows //= workers
        part = Part("m", ((0, rows),), (0, columns))
        places.append(Place("m", nn.Module(), "head" if kind == "head" else "linear", (part,)))
        needed += bands_nbytes((rows, columns), (Band(8, directions),), 64)
    assert needed <= default_slot_bytes(places, workers) <= 2 * needed


@pytest.mark.parametrize("spelt", ["-tp 2", "--tensor-parallel-size=2", "--tensor_parallel_size 2"])
def test_launch_reserves_a_workers_share(spelt, base, tmp_path):
    options = {"group_size": 128, "same": VOCABULARY}
    tenants = {"m": str(random_artifact(base, tmp_path / "a", **options).path)}
    alone, staged = (launched(base, tenants, more=more.split())[1] for more in ("", "-pp 2"))
    launch, both = launched(base, tenants, more=[*spelt.split(), "-pp", "2"])
    assert both["slot_bytes"] < staged["slot_bytes"] < alone["slot_bytes"]
    assert launch.command[-2:] == ["-pp", "2"]
    odd = launched(base, tenants, more=["-tp", "many"])[1]
    assert odd["slot_bytes"] == alone["slot_bytes"]


def test_launch_merges_settings(base, tmp_path):
    artifact = random_artifact(base, tmp_path / "a")
    tenants = {"m": str(artifact.path)}
    computed = launched(base, tenants)[1]
    for option in ("--additional-config", "--additional_config"):
        given = {"deltacome": {"canary": None, "slot_bytes": 7}, "other": [1]}
        launch, settings = launched(base, tenants, more=["--seed", "3", option, json.dumps(given)])
        assert settings == computed | {"canary": None, "slot_bytes": 7}
        assert launch.command.count("--additional-config") == 1
        assert '"other": [1]' in str(launch)
        assert launch.command[-2:] == ["--seed", "3"]
    dense = {"deltacome": {"base": str(base)}}
    other = tmp_path / "quantised"
    extended(base, other, lm_head__weight=torch.zeros(300, 64))
    with pytest.raises(MismatchError, match="wrong base"):
        launched(other, tenants)
    more = [f"--additional-config={json.dumps(dense)}"]
    assert launched(other, tenants, more=more)[1] == computed | dense["deltacome"]


def test_launch_refuses_settings_that_would_be_lost(base, tmp_path):
    (tmp_path / "vllm.yaml").write_text("seed: 3\nadditional_config: {}\n")
    (tmp_path / "more.yaml").write_text("lora-modules:\n- x=/an/adapter\n")
    for more, why in {
        "--additional-config.deltacome.canary null": r'deltacome\.canary: .*write.*"canary": null',
        "--additional_config.deltacome.canary=1": r"deltacome\.canary=1: would replace",
        "--additional-config {": "not valid JSON",
        "--additional-config []": "expected an object",
        '--additional-config {"deltacome":{"canari":1}}': "'canari'",
        f"--config {tmp_path / 'vllm.yaml'}": r"vllm\.yaml: additional-config",
        f"--config {tmp_path / 'more.yaml'}": r"more\.yaml: lora-modules: .* give --lora-modules",
    }.items():
        with pytest.raises(UnsupportedError, match=why):
            plan_launch(str(base), {}, more=more.split())


def test_launch_keeps_tenants_beside_modules_for_vllm(base, tmp_path):
    """vLLM takes the last --lora-modules alone, and what has a comma for JSON."""
    plain = random_artifact(base, tmp_path / "a").path
    comma = random_artifact(base, tmp_path / "v1,2").path
    tenants = {"math": str(plain), "code": str(comma)}
    for words in ("--lora-modules style=/s", "--lora_modules=style=/s", "--lora-modules=style=/s"):
        launch = plan_launch(str(base), tenants, lora=True, more=["--seed", "3", *words.split()])
        assert launch.command.count("--lora-modules") == 1
        given = vllm_parser().parse_args(launch.command[3:])
        said = [(module.name, module.path) for module in given.lora_modules]
        assert said == [("math", str(plain)), ("code", str(comma)), ("style", "/s")]
        assert given.seed == 3


def test_launch_holds_named_tenants_and_four_times_the_slots(base, tmp_path):
    """Not all that a folder has: it may have more than the host can hold."""
    made = random_artifact(base, tmp_path / "t" / "a").path
    for i in range(5):
        shutil.copytree(made, tmp_path / "t" / f"copy-{i}")
    for count, held in ((0, "4"), (6, "6")):
        named = {f"m{i}": str(made) for i in range(count)}
        launch = plan_launch(str(base), named, folder=str(tmp_path / "t"), slots=1)
        assert launch.command[launch.command.index("--max-cpu-loras") + 1] == held


def test_launch_refuses_an_address_that_nothing_installed_can_read(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for address, why in (("s3://b/t", "Install s3fs"), ("nowhere://x", "nowhere")):
        with pytest.raises(UnsupportedError, match=rf"--tenants {address}: .*{why}"):
            plan_launch(str(base), {}, folder=address)
    assert launched(base, {}, folder="memory://b")[1]["tenants"] == "memory://b"


def test_launch_says_that_the_server_is_open(base, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (warning,) = plan_launch(str(base), {}).warnings
    assert "--api-key (or VLLM_API_KEY) or --host 127.0.0.1" in warning
    monkeypatch.setattr(Launch, "run", lambda self: None)
    said = CliRunner().invoke(app, ["serve", str(base)])
    assert (said.stderr, said.stdout) == (f"warning: {warning}\n", "")
    said = CliRunner().invoke(app, ["serve", str(base), "--json"])
    assert (said.stderr, json.loads(said.stdout)["warnings"]) == ("", [warning])
    for more in ("--host 0.0.0.0", "--api-key=x", "--uds /run/it", "--config file"):
        assert plan_launch(str(base), {}, more=more.split()).warnings == []
    monkeypatch.setenv("VLLM_API_KEY", "x")
    assert plan_launch(str(base), {}).warnings == []


def test_launch_checks_fingerprints_first(base, tmp_path):
    other = tmp_path / "other"
    make_base("llama", other, torch.float32)
    artifact = random_artifact(other, tmp_path / "a")
    with pytest.raises(MismatchError, match=r"wrong base|no such tensor"):
        plan_launch(str(base), {"m": str(artifact.path)})
    mixed = {"a": str(random_artifact(base, tmp_path / "x").path)}
    mixed["b"] = str(random_artifact(base, tmp_path / "y", group_size=64).path)
    with pytest.raises(UnsupportedError, match=r"one size of scale groups, got \[32, 64\]"):
        plan_launch(str(base), mixed)


def test_dry_run(base, tmp_path):
    random_artifact(base, tmp_path / "a")
    run = CliRunner().invoke(
        app,
        ["serve", str(base), "--tenant", f"m={tmp_path / 'a'}", "--dry-run", "--", "--seed", "3"],
    )
    assert run.exit_code == 0
    assert run.stdout.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 ")
    assert re.search(
        r"-m vllm\.entrypoints\.openai\.api_server --model .* --seed 3$", run.stdout.strip()
    )
    for wrong in (["--tenant", "m"], ["--tenant", "m=a", "--tenant", "m=b"]):
        assert CliRunner().invoke(app, ["serve", str(base), *wrong]).exit_code == 2
