"""Tenants as the API server knows them, with simulated workers: who holds what, and until when."""

import asyncio
import contextlib
import functools
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from artifact_helpers import random_artifact
from prometheus_client import CollectorRegistry, Gauge
from tiny_pairs import make_base
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMError, VLLMNotFoundError, VLLMValidationError
from vllm.utils.counter import AtomicCounter

from deltacome.errors import ArtifactError, DeltaError, MismatchError, UnsupportedError
from deltacome.vllm import compat, frontend, metrics, registry
from deltacome.vllm.canary import tolerance
from deltacome.vllm.find import StorageError
from deltacome.vllm.locks import Locks
from deltacome.vllm.manager import Held, WorkerManager
from deltacome.vllm.plugin import register
from deltacome.vllm.registry import Registry
from deltacome.vllm.request import content_path
from deltacome.vllm.settings import Settings


class Workers:
    """Simulated engines of one worker each, which hold what they are asked to read."""

    def __init__(self, engines=1, capacity=1, servers=1):
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_cpu_loras=capacity),
            parallel_config=SimpleNamespace(_api_process_count=servers),
        )
        self.engine_core = self
        self.held = [{} for _ in range(engines)]
        self.refused = [set() for _ in range(engines)]
        """For each engine, the tenant numbers that its worker refuses after reading them."""
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.said = []

    async def call_utility_all_async(self, method, name, timeout, args, kwargs):
        assert (method, timeout, kwargs) == ("collective_rpc", None, None)
        self.said.append((name.removeprefix("deltacome_"), *args))
        answers = [getattr(self, name)(engine, *args) for engine in range(len(self.held))]
        await asyncio.sleep(0)
        return [[answer] for answer in answers]

    async def collective_rpc(self, name, timeout=None, args=(), kwargs=None):
        return (await self.call_utility_all_async("collective_rpc", name, None, args, None))[0]

    def deltacome_prefetch(self, engine, id, path):
        self.held[engine][id] = path

    def deltacome_fetched(self, engine, id):
        if id in self.refused[engine]:
            del self.held[engine][id]
            return "MismatchError: w: wrong base"
        return self.may_read.is_set()

    def deltacome_drop(self, engine, id):
        self.held[engine].pop(id, None)

    async def generate(self, prompt, params, *args, lora_request=None, **kwargs):
        try:
            while True:
                yield SimpleNamespace(outputs=[])
                await asyncio.sleep(0)
        finally:
            self.said.append(("abort", lora_request.lora_int_id))
            await asyncio.sleep(0)


class Finder:
    """Finds every name in one folder, which can change, unless its storage is down."""

    def __init__(self, folder):
        self.folder, self.down = folder, False

    async def find(self, name):
        if self.down:
            raise StorageError(f"{name}: cannot be read")
        return self.folder


def serve(workers):
    models = SimpleNamespace(
        lora_requests={},
        lora_id_counter=AtomicCounter(0),
        lora_resolver_lock=Locks(),
        renderer=SimpleNamespace(tokenizer=None),
        model_config=SimpleNamespace(
            get_vocab_size=lambda: 300,
            runner_type="generate",
            logprobs_mode="raw_logprobs",
            generation_config="auto",
            override_generation_config={},
        ),
    )
    return Registry(models, workers, Settings(canary=None))


async def settle(tenants):
    """Waits until no task is left."""
    while tenants._tasks:
        await asyncio.wait(list(tenants._tasks))
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five artifacts of one base."""
    folder = tmp_path_factory.mktemp("tenants")
    make_base("small", folder / "base", torch.float32)
    for i in range(5):
        random_artifact(folder / "base", folder / f"t{i}", seed=i)
    return [folder / f"t{i}" for i in range(5)]


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines logged about tenants; whether vLLM's loggers propagate depends on its settings."""
    monkeypatch.setattr(metrics.logger, "propagate", False)
    metrics.logger.addHandler(caplog.handler)
    caplog.set_level("INFO", metrics.logger.name)
    yield lambda: [record.getMessage() for record in caplog.records]
    metrics.logger.removeHandler(caplog.handler)


def figure(metric, suffix="total"):
    (family,) = metric.collect()
    return next(sample.value for sample in family.samples if sample.name.endswith(suffix))


def counts():
    """Loads, re-reads, refusals."""
    return (
        figure(metrics.LOADS),
        figure(metrics.REREAD_SECONDS, "count"),
        figure(metrics.REFUSED),
    )


# --- names and numbers ---------------------------------------------------------------------------


def test_the_engine_has_one_name_for_one_tenants_weights(folders):
    """Two adapters with one name in a batch would be one to the engine, whatever their kinds."""

    async def run():
        tenants = serve(Workers())
        ordinary = compat.LoRARequest("x", tenants.models.lora_id_counter.inc(1), "/lora")
        tenants.models.lora_requests["x"] = ordinary  # its requests may still run
        first = await tenants.load("x", str(folders[0]))
        second = await tenants.load("x", str(folders[1]))
        assert len({ordinary, first.engine_request, second.engine_request}) == 3
        assert {e.request.lora_name for e in (first, second)} == {"x"}
        assert tenants.named("x") is second

    asyncio.run(run())


def test_a_tenants_name_is_not_an_ordinary_adapters(folders, monkeypatch, tmp_path, log):
    """vLLM would load the adapter under the tenant's number, and go on serving the tenant."""

    async def run():
        tenants = serve(Workers())
        monkeypatch.setattr(frontend, "_registry", tenants)
        await tenants.load("math", str(folders[0]))

        async def original(self, request):
            return "taken" if request.lora_name == "base" else None

        async def ask(name, path):
            request = SimpleNamespace(lora_name=name, lora_path=str(path))
            return await frontend._check_load(original, None, request)

        before = figure(metrics.REFUSED)
        for path in ("/srv/typo/does-not-exist", tmp_path):
            refusal = await ask("math", path)
            assert refusal.error.code == 400
            assert refusal.error.param == "lora_path"
            assert "expected an artifact (delta_config.json)" in refusal.error.message
            assert f"{path}: expected" in log()[-1]  # clients are not told the server's paths
        refusal = await ask("math#3", folders[0])
        assert (refusal.error.code, refusal.error.param) == (400, "lora_name")
        assert "expected a name without '#'" in refusal.error.message
        assert figure(metrics.REFUSED) == before + 3
        assert await ask("math", folders[1]) is None
        assert await ask("other", tmp_path) is None
        assert await ask("base", tmp_path) == "taken"

        async def resolved(self, name):
            return name  # an ordinary adapter that vLLM found

        resolve = functools.partial(frontend._resolve, resolved)
        assert await resolve(None, "other") == "other"
        assert (await resolve(None, "math#3")).error.code == 404

    asyncio.run(run())


def test_a_worker_gives_a_tenant_to_its_own_path_alone():
    manager = object.__new__(WorkerManager)
    held = Held("/t#deltacome-0", SimpleNamespace(result=lambda: "tenant"))
    manager._held = {1: held}
    request = compat.LoRARequest("math#1", 1, "/t#deltacome-0")
    assert manager._load_adapter(request) == "tenant"
    with pytest.raises(MismatchError, match=r"/typo: adapter 1 is the tenant .* /t#deltacome-0"):
        manager._load_adapter(compat.LoRARequest("math", 1, "/typo", load_inplace=True))


def unloading(monkeypatch, tenants):
    """vLLM's registry of names, with our wrapper around its check of unloads."""
    kind, name = compat.OpenAIServingModels, "_check_unload_lora_adapter_request"
    monkeypatch.setattr(kind, name, getattr(kind, name))  # so that it is put back
    compat.wrap(kind, name, frontend._check_unload)
    monkeypatch.setattr(frontend, "_registry", tenants)
    models = object.__new__(kind)
    vars(models).update(vars(tenants.models))
    return models


def test_an_unload_takes_what_has_the_name_when_its_turn_comes(folders, monkeypatch):
    """Not what had it before the load that it waits for, whose weights would be held for ever."""

    async def run():
        workers = Workers(capacity=2)
        tenants = serve(workers)
        models = unloading(monkeypatch, tenants)
        await tenants.load("math", str(folders[0]))
        async with models.lora_resolver_lock["math"]:
            request = SimpleNamespace(lora_name="math")
            unload = asyncio.create_task(models.unload_lora_adapter(request))
            while not models.lora_resolver_lock["math"]._waiters:
                await asyncio.sleep(0)
            await tenants.load("math", str(folders[1]))
        assert "removed successfully" in await unload
        await settle(tenants)
        assert workers.held == [{}]
        assert not tenants.entries
        assert (await models.unload_lora_adapter(request)).error.code == 404

    asyncio.run(run())


def test_what_an_artifact_says_wrongly_is_refused_like_its_weights(folders, tmp_path):
    """And not later in the engine, where it would end the thread that reads requests."""

    async def run():
        tenants = serve(Workers())
        base = folders[0].parent / "base"
        files = {"generation_config.json": b'{"temperature": true}'}
        random_artifact(base, tmp_path / "a", files=files)
        with pytest.raises(ArtifactError, match="temperature: expected a finite number, got True"):
            await tenants.load("a", str(tmp_path / "a"))
        assert not tenants.entries

    asyncio.run(run())


def test_templates_are_filled_with_the_tuned_models_tokens(folders, monkeypatch, tmp_path):
    async def run():
        tenants = serve(Workers())
        monkeypatch.setattr(frontend, "_registry", tenants)
        files = {"tokenizer_config.json": b'{"eos_token": "<|im_end|>", "bos_token": null}'}
        random_artifact(folders[0].parent / "base", tmp_path / "a", files=files)
        await tenants.load("a", str(tmp_path / "a"))

        async def original(request, default_template=None, default_template_kwargs=None):
            return default_template_kwargs

        chat = functools.partial(frontend._preprocess_chat, original)
        request = SimpleNamespace(model="a")
        assert await chat(request, default_template_kwargs=None) == {"eos_token": "<|im_end|>"}
        own = {"eos_token": "<own>", "x": 1}
        assert await chat(request, default_template_kwargs=own) == own
        assert await chat(SimpleNamespace(model="base"), default_template_kwargs=None) is None

    asyncio.run(run())


def test_names_of_clients_leave_no_lock(monkeypatch):
    """vLLM keeps a lock for each name that was ever in a request."""

    async def run():
        models, workers = SimpleNamespace(), Workers()
        vars(workers).update(encode=workers.generate)
        vars(workers.vllm_config).update(additional_config=None)
        monkeypatch.setattr(frontend, "_registry", None)
        monkeypatch.setattr(metrics, "watch", lambda engine: None)
        frontend._init(lambda *args: None, models, workers)
        locks, order = models.lora_resolver_lock, []

        async def wait(i):
            async with locks["math"]:
                order.append(i)
                assert list(locks) == ["math"]
                await asyncio.sleep(0)

        await asyncio.gather(wait(0), wait(1), wait(2))
        assert order == [0, 1, 2]
        assert not len(locks)

    asyncio.run(run())


def test_a_tenants_sampling_defaults_are_not_the_operators(folders, monkeypatch, tmp_path):
    """--override-generation-config says what holds for all; it may be a limit."""

    async def run():
        tenants = serve(Workers())
        monkeypatch.setattr(frontend, "_registry", tenants)
        files = {"generation_config.json": b'{"temperature": 1.5, "top_p": 0.9}'}
        random_artifact(folders[0].parent / "base", tmp_path / "a", files=files)
        await tenants.load("a", str(tmp_path / "a"))

        def defaults(given):
            tenants.models.model_config.override_generation_config = given
            vllms = {"temperature": 0.7, "max_tokens": 9} | given
            return frontend._sampling(lambda *args: args[2], SimpleNamespace(model="a"), 9, vllms)

        own = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 9}
        assert defaults({}) == own
        assert defaults({"temperature": 0.0}) == own | {"temperature": 0.0}

    asyncio.run(run())


def test_a_tenant_named_like_a_kind_of_content_does_not_answer_for_the_base(folders):
    """vLLM has adapters for images and sound, which it finds by their names."""

    async def run():
        models = serve(Workers()).models
        serving = compat.BaseServing(models=models, model_config=None, request_logger=None)
        serving._is_model_supported = lambda name: name == "base"
        tenant = compat.LoRARequest("text", 1, f"{content_path(str(folders[0]))}")
        adapter = compat.LoRARequest("image", 2, "/an/adapter")
        models.lora_requests.update(text=tenant, image=adapter)
        parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {}}]

        def given(name, parts):
            request = SimpleNamespace(model=name, messages=[{"role": "user", "content": parts}])
            return serving._maybe_get_adapters(request, supports_default_mm_loras=True)

        assert given("base", parts[:1]) is None
        assert given("base", parts) is adapter
        assert given("text", parts) is tenant

    register()
    asyncio.run(run())


def test_arguments_of_the_engine_can_be_named(folders):
    """Pooling and realtime routes name all of them."""

    async def run():
        tenants = serve(Workers())
        entry = await tenants.load("math", str(folders[0]))

        async def encode(prompt, pooling_params, request_id, lora_request=None, priority=0):
            yield SimpleNamespace(
                outputs=[], said=[prompt, pooling_params, request_id, lora_request]
            )

        with_tenant = frontend._with_tenant(encode, tenants)
        names = ("prompt", "pooling_params", "request_id", "lora_request")
        for given, got in ((entry.request, entry.engine_request), (None, None)):
            values = ["ids", "params", "id", given]
            for named in range(len(names) + 1):
                by_name = dict(zip(names[named:], values[named:], strict=True))
                (output,) = [one async for one in with_tenant(*values[:named], **by_name)]
                assert output.said == ["ids", "params", "id", got]

    asyncio.run(run())


def test_a_folder_that_is_no_tenant_where_there_are_only_tenants(folders, monkeypatch):
    """vLLM would have the workers read it, and answer that the server failed."""

    async def run():
        workers = Workers()
        tenants = serve(workers)
        tenants.settings = Settings(lora=False)
        monkeypatch.setattr(frontend, "_registry", tenants)
        request = compat.LoadLoRAAdapterRequest(lora_name="m", lora_path=str(folders[0].parent))
        refusal = await frontend._load(None, SimpleNamespace(), request)
        assert (refusal.error.code, refusal.error.param) == (400, "lora_path")
        assert "expected an artifact (delta_config.json), found none" in refusal.error.message
        assert workers.said == []

    asyncio.run(run())


def test_decisions_are_not_read_in_another_models_template(folders, monkeypatch, tmp_path):
    async def run():
        tenants = serve(Workers())
        monkeypatch.setattr(frontend, "_registry", tenants)
        template = {"chat_template.jinja": b"{{ messages[0]['content'] }}"}
        for name, files in (("own", template), ("plain", {})):
            random_artifact(folders[0].parent / "base", tmp_path / name, files=files)
            await tenants.load(name, str(tmp_path / name))

        async def check(request):
            return None

        async def original(self, request, raw_request):
            return "decided"

        serving = SimpleNamespace(_check_model=check)
        refusal = await frontend._decide(original, serving, SimpleNamespace(model="own"))
        assert "own: has a chat template of its own" in refusal.error.message
        for name in ("plain", "base"):
            said = await frontend._decide(original, serving, SimpleNamespace(model=name))
            assert said == "decided"

    asyncio.run(run())


def test_canaries_need_an_engine_with_logprobs():
    def config(runner="generate", mode="raw_logprobs"):
        return SimpleNamespace(runner_type=runner, logprobs_mode=mode)

    assert tolerance(0.25, config()) == 0.25
    assert tolerance(0.25, config("pooling")) is None
    assert tolerance(None, config(mode="raw_logits")) is None
    with pytest.raises(UnsupportedError, match="a canary needs logprobs, got processed_logits"):
        tolerance(0.25, config(mode="processed_logits"))


def test_a_request_of_sagemakers_route(folders, monkeypatch):
    """/adapters does not pass vLLM's request class, and a path may be anything."""

    async def run():
        tenants = serve(Workers())
        monkeypatch.setattr(frontend, "_registry", tenants)

        async def check(request):
            return None

        async def original(self, request, base_model_name):
            return type(request).__name__

        models = SimpleNamespace(lora_resolver_lock=Locks(), _check_load_lora_adapter_request=check)
        load = functools.partial(frontend._load, original)

        def asked(path, in_place=False):
            return SimpleNamespace(lora_name="math", lora_path=path, load_inplace=in_place)

        assert "'math' added" in await load(models, asked(str(folders[0])))
        assert tenants.named("math").request.lora_path.startswith(str(folders[0]))
        for path in ("a/" + "b" * 5000, "/" + "b" * 5000, "a\0b"):
            assert await load(models, asked(path)) == "LoadLoRAAdapterRequest"
        refusal = await load(models, asked(str(folders[0]), "perhaps"))
        assert (refusal.error.code, refusal.error.param) == (400, "lora_path")

    asyncio.run(run())


def test_downloads_from_the_hub_hold_up_nobody_else(folders, monkeypatch):
    """However many: asyncio's threads, of which a small machine has six, also read manifests."""

    async def run():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        tenants, may_end = serve(Workers()), threading.Event()
        monkeypatch.setattr(frontend, "_registry", tenants)

        def download(*args, **kwargs):
            may_end.wait(60)
            raise OSError("there is none")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)

        async def check(request):
            return None

        models = SimpleNamespace(lora_resolver_lock=Locks(), _check_load_lora_adapter_request=check)

        def load(name, path):
            request = compat.LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
            return asyncio.create_task(frontend._load(taken_as_it_is, models, request))

        slow = load("slow", "org/slow")
        try:
            assert "'math' added" in await asyncio.wait_for(load("math", str(folders[0])), 20)
        finally:
            may_end.set()
        assert await slow == "org/slow"

    async def taken_as_it_is(self, request, base_model_name):
        return request.lora_path

    asyncio.run(run())


def test_all_but_probes_and_metrics_asks_for_the_key(monkeypatch):
    async def run():
        said = []

        async def app(scope, receive, send):
            said.append(200)

        async def send(message):
            said.extend([message["status"]] if "status" in message else [])

        guard = compat.AuthenticationMiddleware(app, ["secret"])
        vllms = compat.AuthenticationMiddleware.__call__
        call = functools.partial(frontend._authenticate, vllms)

        async def ask(path, key=None, method="POST", **more):
            headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
            scope = {"type": "http", "method": method, "path": path, "headers": headers, **more}
            await call(guard, scope, None, send)
            return said.pop()

        monkeypatch.setattr(frontend, "_registry", object())
        closed = ("/adapters", "/adapters/math", "/invocations", "/tokenize", "/healthy", "/", "")
        for path in (*closed, "/metrics/../adapters", "/v1/models"):
            assert await ask(path) == 401, path
            assert await ask(path, "another") == 401
            assert await ask(path, "secret") == 200
        for path in frontend.OPEN:
            assert await ask(path) == await ask(f"/api{path}", root_path="/api") == 200
        assert await ask("/tokenize", method="OPTIONS") == 200  # browsers send this first
        monkeypatch.setattr(frontend, "_registry", None)  # without tenants, as in vLLM
        assert await ask("/tokenize") == 200
        assert await ask("/v1/models") == 401

    asyncio.run(run())


# --- several engines, several servers -------------------------------------------------------------


def test_every_engine_is_asked(folders):
    async def run():
        workers = Workers(engines=2)
        tenants = serve(workers)
        workers.refused[1] = {1}
        with pytest.raises(DeltaError, match="wrong base"):
            await tenants.load("math", str(folders[0]))
        await settle(tenants)
        assert tenants.named("math") is None
        assert workers.held == [{}, {}]  # not even the engine that accepted it holds it
        entry = await tenants.load("math", str(folders[0]))
        await tenants._drop(entry)
        assert workers.held == [{}, {}]
        workers.refused[1] = {2}
        before = figure(metrics.REFUSED)
        with pytest.raises(VLLMValidationError, match="wrong base"):
            async with tenants.using(entry.request):
                pass
        assert workers.held == [{}, {}]
        assert figure(metrics.REFUSED) == before + 1

    asyncio.run(run())


def test_several_api_servers_are_refused(folders):
    async def run():
        tenants = serve(Workers(servers=2))
        with pytest.raises(UnsupportedError, match=r"got 2: set --api-server-count 1"):
            await tenants.load("math", str(folders[0]))

    asyncio.run(run())


def test_the_base_does_not_answer_for_names_that_are_not_loaded(folders, monkeypatch):
    """With this variable vLLM has it do so: for a tenant that is not found yet, or unloaded."""

    async def run():
        monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
        with pytest.raises(UnsupportedError, match=r"^VLLM_SKIP_MODEL_NAME_VALIDATION: .* unset"):
            await serve(Workers()).load("math", str(folders[0]))
        workers = Workers()
        workers.vllm_config.additional_config = {"deltacome": {"tenants": str(folders[0].parent)}}
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with pytest.raises(UnsupportedError, match=r"^VLLM_SKIP_MODEL_NAME_VALIDATION: .* unset"):
            frontend._init(lambda *args: None, SimpleNamespace(), workers)

    asyncio.run(run())


# --- how long workers hold a tenant ---------------------------------------------------------------


def test_who_goes_while_a_tenant_is_read_leaves_nothing(folders):
    """The workers finish reading; what they then hold is known, and dropped like any idle tenant's."""

    async def run():
        workers = Workers()
        tenants = serve(workers)
        entries = [await tenants.load(f"t{i}", str(f)) for i, f in enumerate(folders)]
        await settle(tenants)
        for entry in entries:
            await tenants._drop(entry)
        assert workers.held == [{}]
        workers.may_read.clear()

        async def ask(entry):
            async with tenants.using(entry.request):
                pass

        asked = [asyncio.create_task(ask(entry)) for entry in entries for _ in range(2)]
        while len(workers.held[0]) < len(entries):
            await asyncio.sleep(0)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        workers.may_read.set()
        await settle(tenants)
        held = {entry.request.lora_int_id for entry in entries if entry.held}
        assert set(workers.held[0]) == held
        assert len(held) == 1
        assert [entry.users for entry in entries] == [0] * 5
        for entry in entries:
            tenants.unload(entry.request)
        await settle(tenants)
        assert workers.held == [{}]
        assert not tenants.entries

    asyncio.run(run())


def test_who_tries_again_waits_for_what_was_begun(folders, monkeypatch):
    """With a time limit shorter than a copy or a read, it would otherwise be begun again for ever."""

    async def run():
        workers = Workers()
        tenants, may_find, finds = serve(workers), asyncio.Event(), []
        monkeypatch.setattr(frontend, "_registry", tenants)
        workers.may_read.clear()

        async def find(name):
            finds.append(name)
            await may_find.wait()
            return folders[0]

        tenants.models._finder = Finder(folders[0])
        tenants.models._finder.find = find
        resolve = functools.partial(frontend._resolve, None, tenants.models, "math")

        async def leave_while(running):
            asked = asyncio.create_task(resolve())
            while not (running() or asked.done()):
                await asyncio.sleep(0.001)
            asked.cancel()
            await asyncio.wait([asked])

        for _ in range(3):
            await leave_while(lambda: finds)
        may_find.set()
        for _ in range(3):
            await leave_while(lambda: workers.held[0])
        workers.may_read.set()
        assert await resolve() is tenants.named("math").request
        await settle(tenants)
        assert finds == ["math"]
        assert [what for what, *_ in workers.said if what != "fetched"] == ["prefetch"]
        assert not tenants._shared

    asyncio.run(run())


def test_other_weights_that_cannot_be_read_again_leave_no_user(folders):
    """Another request loads what is found by now, which is dropped and refused before this one has it."""

    async def run():
        workers = Workers()
        tenants = serve(workers)
        finder = Finder(folders[0])
        old = await tenants.load("math", str(folders[0]), finder)
        await tenants._drop(old)
        finder.folder = folders[1]

        async def ask():
            async with tenants.using(old.request):
                pass

        lock = tenants.models.lora_resolver_lock["math"]
        async with lock:
            asked = asyncio.create_task(ask())
            while not lock._waiters:
                await asyncio.sleep(0.001)
            new = await tenants.load("math", str(finder.folder), finder)
            await tenants._drop(new)
            workers.refused[0] = {new.request.lora_int_id}
        with pytest.raises(VLLMValidationError, match="wrong base"):
            await asked
        assert (old.users, new.users) == (0, 0)
        tenants.unload(tenants.models.lora_requests.pop("math"))
        await settle(tenants)
        assert not tenants.entries
        with pytest.raises(VLLMNotFoundError):
            await ask()

    asyncio.run(run())


@pytest.mark.parametrize("refused", ["by a worker", "as not complete yet"])
@pytest.mark.parametrize("kept", [True, False])
def test_dropped_weights_stay_if_those_in_their_place_are_refused(
    kept, refused, folders, monkeypatch, tmp_path, log
):
    """As they do while they are held: who is served must not depend on who else is."""

    async def run():
        workers = Workers()
        tenants = serve(workers)
        copied = shutil.copytree(folders[0], tmp_path / "copied")
        finder = Finder(copied)
        old = await tenants.load("math", str(copied), finder)
        await tenants._drop(old)
        finder.folder = folders[1]
        workers.refused[0] = {2}
        if refused == "as not complete yet":
            monkeypatch.setattr(finder, "find", incomplete)
        if kept:
            async with tenants.using(old.request) as entry:
                assert (entry, entry.held) == (old, True)
            assert any(line.startswith("Refused tenant 'math'") for line in log())
        else:  # a folder whose files were overwritten
            shutil.rmtree(copied)
            with pytest.raises(VLLMValidationError, match=r"wrong base|not complete yet"):
                async with tenants.using(old.request):
                    pass
        assert tenants.named("math") is old
        await settle(tenants)

    async def incomplete(name):
        raise ArtifactError(f"{name}: not complete yet")

    asyncio.run(run())


def test_a_name_that_was_given_away_is_not_taken_back(folders):
    """By a request that came before, and finds other weights where its tenant was."""

    async def run():
        tenants, finder = serve(Workers()), Finder(folders[0])
        old = await tenants.load("math", str(folders[0]), finder)
        await tenants._drop(old)
        finder.folder = folders[1]

        async def ask():
            async with tenants.using(old.request) as entry:
                return entry

        names = tenants.models.lora_requests
        async with (lock := tenants.models.lora_resolver_lock["math"]):
            asked = asyncio.create_task(ask())
            while not lock._waiters:
                await asyncio.sleep(0.001)
            tenants.unload(names["math"])
            names["math"] = ordinary = compat.LoRARequest("math", 9, "/lora")
        assert await asked is old  # whose bytes are still there
        assert names == {"math": ordinary}
        await settle(tenants)
        assert not tenants.entries

    asyncio.run(run())


def test_weights_that_are_replaced_in_their_place_are_served_soon(folders, monkeypatch, log):
    """By requests that come a while later, and only once they were read."""

    async def run():
        workers = Workers(capacity=2)
        tenants, finder = serve(workers), Finder(folders[0])
        old = await tenants.load("math", str(folders[0]), finder)
        finder.folder = folders[1]

        async def served():
            async with tenants.using(old.request) as entry:
                assert entry.held
            await settle(tenants)
            return entry

        assert await served() is old
        assert tenants.named("math") is old  # it was looked at just now
        monkeypatch.setattr(registry, "RENEW_SECONDS", 0)
        workers.refused[0].add(2)
        assert await served() is old  # the other weights are refused
        assert tenants.named("math") is old
        assert any("Refused tenant 'math'" in line for line in log())
        monkeypatch.setattr(registry, "REFUSED_SECONDS", 0)
        tenants._refused.clear()
        assert await served() is old  # while they are read
        new = tenants.named("math")
        assert new is not old
        assert await served() is new
        assert list(tenants.entries.values()) == [new]
        finder.folder = None  # deleted: it goes on
        assert await served() is new
        finder.folder = folders[2]
        tenants.models.lora_requests.pop("math")  # unloaded while somebody looks
        await tenants._renew(new, finder)
        assert tenants.named("math") is None

    asyncio.run(run())


@pytest.mark.parametrize("end", ["close", "cancel"])
def test_a_request_is_aborted_before_its_tenant_is_dropped(end, folders):
    """A step in between would read the tenant again, in the engine's loop."""

    async def run():
        workers = Workers()
        tenants = serve(workers)
        entry = await tenants.load("math", str(folders[0]))
        generate = frontend._with_tenant(workers.generate, tenants)
        outputs = generate("", None, lora_request=entry.request)
        await anext(outputs)
        tenants.unload(entry.request)
        await settle(tenants)
        assert workers.held != [{}]  # the request is running
        workers.said = []
        if end == "close":
            await outputs.aclose()
        else:
            task = asyncio.create_task(drain(outputs))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await settle(tenants)
        assert workers.said == [("abort", 1), ("drop", 1)]

    asyncio.run(run())


def test_a_storage_that_is_down_leaves_what_was_copied(folders, monkeypatch, tmp_path):
    async def run():
        tenants = serve(Workers())
        copied = shutil.copytree(folders[0], tmp_path / "copied")
        finder = Finder(copied)
        entry = await tenants.load("math", str(copied), finder)
        await tenants._drop(entry)
        finder.down = True
        async with tenants.using(entry.request) as used:
            assert (used, used.held) == (entry, True)
        await tenants._drop(entry)
        shutil.rmtree(copied)  # nothing is left to serve
        with pytest.raises(VLLMValidationError, match="math"):
            async with tenants.using(entry.request):
                pass

    asyncio.run(run())


def test_a_client_is_told_that_a_storage_is_down(folders, monkeypatch):
    """Not that the model does not exist, which vLLM makes of most refusals: nobody tries that again."""

    async def run():
        finder = Finder(folders[0])
        finder.down = True
        models = serve(Workers()).models
        vars(models).update(_finder=finder, base_model_paths=[])
        models.resolve_lora = functools.partial(frontend._resolve, None, models)
        serving = SimpleNamespace(
            models=models,
            request_logger=None,
            _is_model_supported=lambda name: False,
            create_error_response=create_error_response,
        )
        monkeypatch.setattr(frontend, "_registry", Registry(models, Workers(), Settings()))
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        for kind in (compat.BaseServing, compat.PoolingBaseServing):
            with pytest.raises(VLLMError, match=r"^another: cannot be read") as refused:
                await kind._check_model(serving, SimpleNamespace(model="another"))
            told = create_error_response(refused.value).error
            assert (told.code, told.type) == (503, "ServiceUnavailableError")

    asyncio.run(run())


async def drain(outputs):
    async for _ in outputs:
        pass


# --- how often workers are asked ------------------------------------------------------------------


def test_what_workers_refused_is_not_read_at_each_request(folders, monkeypatch):
    """Reading it again, only to refuse it again, would keep all others waiting."""

    async def run():
        workers = Workers()
        tenants, finder = serve(workers), Finder(folders[0])
        workers.refused[0] = {*range(1, 5)}

        async def reads(folder, finder):
            with pytest.raises(DeltaError, match="w: wrong base"):
                await tenants.load("math", str(folder), finder)
            return sum(name == "prefetch" for name, *_ in workers.said)

        assert [await reads(folders[0], finder) for _ in range(3)] == [1, 1, 1]
        assert await reads(folders[1], finder) == 2  # other weights
        assert await reads(folders[0], None) == 3  # a load command
        monkeypatch.setattr(registry, "REFUSED_SECONDS", 0)
        assert await reads(folders[0], None) == 4
        entry = await tenants.load("math", str(folders[0]), finder)  # after a while
        monkeypatch.undo()
        await tenants._drop(entry)
        workers.refused[0] = {entry.request.lora_int_id}
        before = len(workers.said)
        for _ in range(3):
            with pytest.raises(VLLMValidationError, match="w: wrong base"):
                async with tenants.using(entry.request):
                    pass
        assert sum(name == "prefetch" for name, *_ in workers.said[before:]) == 1
        tenants.unload(tenants.models.lora_requests.pop("math"))
        await settle(tenants)
        assert not tenants.entries

    asyncio.run(run())


def test_workers_are_asked_less_and_less_and_about_one_at_a_time(folders, monkeypatch):
    async def run():
        workers = Workers()
        tenants = serve(workers)
        workers.may_read.clear()
        pauses, sleep = [], asyncio.sleep

        async def slept(seconds):
            if seconds:
                pauses.append(seconds)
                if len(pauses) == 8:
                    workers.may_read.set()
            await sleep(0)

        monkeypatch.setattr(registry.asyncio, "sleep", slept)
        names = enumerate(folders[:3])
        await asyncio.gather(*(tenants.load(f"t{i}", str(folder)) for i, folder in names))
        assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.25, 0.25, 0.25]
        asked = [id for name, id, *_ in workers.said if name == "fetched"]
        assert asked == [asked[0]] * 9 + asked[9:]
        assert len(asked) == 11

    asyncio.run(run())


# --- what operators see ---------------------------------------------------------------------------


def test_what_happens_to_tenants_is_counted_and_logged(folders, log):
    async def run():
        workers = Workers()
        tenants = serve(workers)
        before = counts()
        entry = await tenants.load("math", str(folders[0]))
        await tenants._drop(entry)
        assert counts() == (before[0] + 1, *before[1:])
        for _ in range(2):  # the second time it is already held
            async with tenants.using(entry.request):
                assert counts() == (before[0] + 1, before[1] + 1, before[2])
        await tenants._drop(entry)
        workers.refused[0] = {1}
        with pytest.raises(VLLMValidationError):
            async with tenants.using(entry.request):
                pass
        assert counts() == tuple(count + 1 for count in before)
        tenants.unload(entry.request)
        await settle(tenants)

    asyncio.run(run())
    assert [re.split(" in |: ", line)[0] for line in log()] == [
        "Loaded tenant 'math'",
        "Dropped tenant 'math' from the workers",
        "Read tenant 'math' again",
        "Dropped tenant 'math' from the workers",
        "Refused tenant 'math'",
        "Unloaded tenant 'math'",
    ]
    assert log()[4].endswith("w: wrong base")
    assert f"{folders[0]}#deltacome-" in log()[0]  # names the weights
    assert metrics.logger.name.startswith("vllm.")  # other loggers have no handler in a server


def test_figures_are_of_tenants_that_are_there(folders):
    """Otherwise a client that loads and unloads for ever would make metrics take ever longer."""

    def tenants_with_tokens():
        (family,) = metrics.TOKENS.collect()
        return {sample.labels["tenant"] for sample in family.samples}

    async def run():
        tenants = serve(Workers())
        await tenants.load("passing", str(folders[0]))
        metrics.TOKENS.labels("passing").inc()
        await tenants.load("passing", str(folders[1]))
        await settle(tenants)
        assert "passing" in tenants_with_tokens()
        tenants.unload(tenants.models.lora_requests.pop("passing"))
        await settle(tenants)
        assert "passing" not in tenants_with_tokens()

    asyncio.run(run())
    gauge = Gauge("adapters", "", ["running"], registry=CollectorRegistry())
    logger = SimpleNamespace(gauge_lora_info=gauge)

    def original(self, stats, iteration=None):
        if stats:
            self.gauge_lora_info.labels(stats).set(iteration)

    record = functools.partial(metrics.record_present_adapters, original)
    for i in range(3):
        record(logger, f"math#{i}", i)
        record(logger, None)
    (family,) = gauge.collect()
    assert [sample.labels["running"] for sample in family.samples] == ["math#2"]


def test_what_others_wrote_is_one_line_of_the_log(log):
    error = DeltaError(f"w\n\x1b[31mRefused tenant 'x'{'y' * 9999}")
    metrics.refused("a\nb", error)
    error = DeltaError("short")
    error.__cause__ = OSError("the line is dead")
    metrics.refused("a", error)
    long, short = log()
    assert long.startswith("Refused tenant 'a\\nb': w\N{REPLACEMENT CHARACTER}")
    assert long.isprintable()
    assert len(long) < 1100
    assert short == "Refused tenant 'a': short (OSError('the line is dead'))"


def test_figures_go_on_when_workers_could_not_be_asked(log, monkeypatch):
    async def run():
        asked = 0

        async def ask(*args):
            nonlocal asked
            asked += 1
            if asked in (1, 2, 4):
                raise RuntimeError("busy")
            return [[dict.fromkeys(metrics.FIGURES, asked)]]

        monkeypatch.setattr(metrics, "WATCH_SECONDS", 0)
        engine = SimpleNamespace(engine_core=SimpleNamespace(call_utility_all_async=ask))
        metrics.watch(engine)
        while asked < 6:
            await asyncio.sleep(0)
        engine._deltacome_watch.cancel()
        assert figure(metrics.FIGURES["held"], "tenants") >= 5

    asyncio.run(run())
    assert log() == ["No figures of tenants from the workers: RuntimeError('busy')"] * 2
