"""Which tenants the API server knows by name, who uses them, and which of them the workers hold.

vLLM loads adapters within a step of the engine: reading there stalls everybody, and a folder that has
changed or gone stops the engine. So the workers are asked beforehand to read a tenant in a thread, and
hold it until they are told to drop it. That happens when nobody uses it any more:

- *unload* and *reload* forget a name, or give it other weights, at once, as does finding other weights
  where a tenant was found; running requests go on with the weights they began with, and the last of them
  frees the memory. Other weights are another adapter to the engine, so that no step and no cached prefix
  ever mixes the two;
- when more tenants are held than `--max-cpu-loras`, the idle one that was used longest ago is dropped,
  and read again when it is asked for. Its folder must then hold what it held before.

Only one API server may tell the workers: a second one would drop what the first one's requests use.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, TypeVarTuple

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from deltacome.errors import DeltaError, MismatchError, UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.vllm import compat, metrics
from deltacome.vllm.canary import check_canary, tolerance
from deltacome.vllm.find import Finder, StorageError
from deltacome.vllm.manners import Manners
from deltacome.vllm.refuse import refuse_any_name
from deltacome.vllm.request import artifact_path, content_path, is_unchanged
from deltacome.vllm.settings import Settings

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
POLL_SECONDS = (0.01, 0.25)
"""Pause before the workers are asked again whether they have read an artifact, at first and at most: an
answer waits for running steps."""
RENEW_SECONDS = 60.0
"""How long a tenant that was found is served before a request has somebody look whether its place holds
other weights by now."""
REFUSED_SECONDS = 60.0
"""How long requests do not have a refused tenant read again while its folder holds the same."""
MARK = "#"
"""Between name and number in the engine's name of a tenant; no adapter's own name has one."""


@dataclass(eq=False)
class Entry:
    """A tenant's weights under a name."""

    name: str
    request: Any
    """What vLLM's registry has: the name, and the folder with a digest of its contents."""
    engine_request: Any
    """What the engine gets. It tells adapters apart by name where it should by number, so no two sets of
    weights share a name there, whatever kinds of adapters had the name before."""
    manners: Manners
    finder: Finder | None
    """What found it, if it was first named by a request and not by a command."""
    users: int = 0
    held: bool = False
    gone: bool = False
    used: int = 0
    """The clock when it was last used."""
    looked: float = field(default_factory=time.monotonic)
    """When its place was last looked at, in seconds."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the workers read or drop it."""


class Registry:
    """The tenants of one API server.

    Args:
        models: vLLM's registry of names.
        engine: the client of the engine, before its `generate` is replaced.
        settings: of the plugin.
    """

    def __init__(self, models: Any, engine: Any, settings: Settings) -> None:
        self.models = models
        self.settings = settings
        self.capacity: int = engine.vllm_config.lora_config.max_cpu_loras
        self.entries: dict[int, Entry] = {}
        self._engine = engine
        self._servers = compat.api_servers(engine.vllm_config)
        self._generate = engine.generate
        self._clock = itertools.count()
        self._polling = asyncio.Lock()
        self._refused: dict[tuple[str, str], tuple[float, DeltaError]] = {}
        """By name and path: until when it is not read again, and why."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shared: dict[Hashable, asyncio.Task[Any]] = {}
        """Tasks that requests wait for together, by what they do."""

    def named(self, name: str | None) -> Entry | None:
        """The tenant that requests for a name get."""
        request = self.models.lora_requests.get(name)
        return None if request is None else self.entries.get(request.lora_int_id)

    async def find(self, name: str, finder: Finder) -> Any | None:
        """vLLM's request for a name; a tenant that nobody has loaded is looked for. None: there is none.

        Raises:
            StorageError: the storage does not answer.
            DeltaError: as `load` and `Finder.find`.
        """
        return await self._together(self._find, name, finder)

    async def _find(self, name: str, finder: Finder) -> Any | None:
        async with self.models.lora_resolver_lock[name]:
            if name not in self.models.lora_requests:
                folder = await finder.find(name)
                if folder is None:
                    return None
                await self.load(name, str(folder), finder)
            return self.models.lora_requests[name]

    async def load(self, name: str, folder: str, finder: Finder | None = None) -> Entry:
        """Gives a name to an artifact; the caller holds the lock of the name.

        Raises:
            UnsupportedError: there are several API servers, or the base answers for any name.
            DeltaError: a worker or the canary refused it; whatever had the name keeps it.
        """
        if self._servers > 1:
            raise UnsupportedError(
                f"{folder}: expected one API server, as only it knows which tenants are in use, got "
                f"{self._servers}: set --api-server-count 1"
            )
        refuse_any_name()
        start = time.perf_counter()
        path = await asyncio.to_thread(content_path, folder)
        if finder is not None:
            self._check_refused(name, path)
        artifact = await asyncio.to_thread(Artifact.open, artifact_path(path))
        size = self.models.model_config.get_vocab_size()
        words = (artifact, self._vocabulary, size, self.settings.templates)
        manners = await asyncio.to_thread(Manners.read, *words)
        id = self.models.lora_id_counter.inc(1)
        request = compat.LoRARequest(name, id, path)
        engine_request = compat.LoRARequest(f"{name}{MARK}{id}", id, path)
        entry = self.entries[id] = Entry(name, request, engine_request, manners, finder)
        with self._counted(entry):
            try:
                await asyncio.shield(self._start(self._read(entry)))
                limit = tolerance(self.settings.canary, self.models.model_config)
                await check_canary(self._generate, artifact, engine_request, limit, size)
            except BaseException as error:
                self._retire(entry)
                if isinstance(error, DeltaError):  # the canary, too, is asked after all is read
                    self._remember(entry, error)
                raise
            previous = self.named(name)
            self.models.lora_requests[name] = request
            if previous is not None:
                self._retire(previous)
        metrics.loaded(name, path, time.perf_counter() - start)
        return entry

    def unload(self, request: Any) -> None:
        """Has the workers drop what a name had, once the last request that uses it has ended."""
        if entry := self.entries.get(request.lora_int_id):
            metrics.unloaded(entry.name, entry.request.lora_path)
            self._retire(entry)

    @contextlib.asynccontextmanager
    async def using(self, request: Any) -> AsyncIterator[Entry]:
        """While open, the workers hold the tenant of a request.

        Raises:
            VLLMNotFoundError: it was unloaded before the request got here.
            VLLMValidationError: it cannot be read again.
        """
        entry = self.entries.get(request.lora_int_id)
        if entry is None or entry.gone:  # replaced or unloaded since its name was looked up
            entry = self.named(request.lora_name)
        if entry is None:
            raise VLLMNotFoundError(f"The model `{request.lora_name}` was unloaded.")
        with contextlib.ExitStack() as counts:
            counts.enter_context(self._counted(entry))
            try:
                entry = await self._latest(entry)
                counts.enter_context(self._counted(entry))
                await self._hold(entry)
            except DeltaError as error:
                metrics.refused(entry.name, error)
                raise VLLMValidationError(f"{entry.name}: {error}", parameter="model") from error
            yield entry

    @contextlib.contextmanager
    def _counted(self, entry: Entry) -> Iterator[None]:
        """While open, an entry has one more user."""
        entry.users += 1
        try:
            yield
        finally:
            entry.users -= 1
            entry.used = next(self._clock)
            self._trim()

    async def _latest(self, entry: Entry) -> Entry:
        """The entry itself; a new one, if it is not held and its name now finds other weights.

        While it is held, requests go on with it until those other weights have been read. If those are
        refused, and its own are still in their folder, it stays.
        """
        if entry.finder is None:
            return entry
        if not entry.held:
            try:
                return await self._together(self._newer, entry, entry.finder)
            except DeltaError as error:
                if not await asyncio.to_thread(is_unchanged, entry.request.lora_path):
                    raise
                metrics.refused(entry.name, error)
                return entry
        if entry.looked + RENEW_SECONDS <= time.monotonic():
            entry.looked = time.monotonic()
            self._start(self._renew(entry, entry.finder))
        return entry

    async def _renew(self, entry: Entry, finder: Finder) -> None:
        try:
            await self._newer(entry, finder)
        except DeltaError as error:  # what is served stays
            metrics.refused(entry.name, error)

    async def _newer(self, entry: Entry, finder: Finder) -> Entry:
        """What a tenant's name finds now; if the name has gone to other weights meanwhile, those."""
        try:
            folder = await finder.find(entry.name)
        except StorageError as error:  # what was loaded is on disk, and `_read` checks that it is
            metrics.logger.warning("%s: tenant %r is served as it was", error, entry.name)
            return entry
        if folder is None:
            return entry
        if await asyncio.to_thread(content_path, str(folder)) == entry.request.lora_path:
            return entry
        async with self.models.lora_resolver_lock[entry.name]:
            if self.named(entry.name) is entry:
                return await self.load(entry.name, str(folder), finder)
        return self.named(entry.name) or entry

    async def _hold(self, entry: Entry) -> None:
        """Has the workers read a tenant again, unless they hold it."""
        if not entry.held:
            await self._together(self._reread, entry)

    async def _reread(self, entry: Entry) -> None:
        self._check_refused(entry.name, entry.request.lora_path)
        start = time.perf_counter()
        await self._read(entry)
        metrics.reread(entry.name, entry.request.lora_path, time.perf_counter() - start)

    def _remember(self, entry: Entry, error: DeltaError) -> None:
        """Remembers a refusal, before which all bytes may be read: that keeps other tenants waiting."""
        now = time.monotonic()
        self._refused = {key: one for key, one in self._refused.items() if one[0] > now}
        self._refused[entry.name, entry.request.lora_path] = now + REFUSED_SECONDS, error

    def _check_refused(self, name: str, path: str) -> None:
        until, error = self._refused.get((name, path), (0.0, None))
        if error is not None and until > time.monotonic():
            raise DeltaError(f"{error} (refused before; it is read again after at most a minute)")

    async def _read(self, entry: Entry) -> None:
        """Has the workers read a tenant alongside their other work."""
        id, path = entry.request.lora_int_id, entry.request.lora_path
        async with entry.lock:
            if await asyncio.to_thread(content_path, artifact_path(path)) != path:
                raise MismatchError(
                    f"{artifact_path(path)}: holds other weights than those that were loaded: load it "
                    "again, with load_inplace"
                )
            try:
                await self._ask("deltacome_prefetch", id, path)
                await self._fetched(id)
            except DeltaError as error:
                self._remember(entry, error)
                await self._ask("deltacome_drop", id)  # a worker refused it, others have read it
                raise
            self._refused.pop((entry.name, path), None)
            entry.held = True
        self._trim()

    async def _fetched(self, id: int) -> None:
        """Waits until the workers have read an artifact.

        They read one after the other, in the order of asking, so they are asked about one at a time.
        """
        pause, longest = POLL_SECONDS
        async with self._polling:
            while True:
                states = await self._ask("deltacome_fetched", id)
                if refusals := [state for state in states if isinstance(state, str)]:
                    raise DeltaError(refusals[0])
                if all(states):
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        return await compat.ask_workers(self._engine, method, *args)

    def _retire(self, entry: Entry) -> None:
        entry.gone = True
        self._trim()

    def _trim(self) -> None:
        """Drops what nobody can ask for again, and idle tenants beyond the capacity."""
        idle = [entry for entry in self.entries.values() if entry.users == 0]
        for entry in idle:
            if entry.gone:
                self._start(self._drop(entry))
        held = sum(entry.held for entry in self.entries.values() if not entry.gone)
        idle = sorted((e for e in idle if e.held and not e.gone), key=lambda entry: entry.used)
        for entry in idle[: max(0, held - self.capacity)]:
            self._start(self._drop(entry))

    async def _drop(self, entry: Entry) -> None:
        async with entry.lock:  # whoever asks for it meanwhile waits, and has it read again
            if entry.users or not (entry.held or entry.gone):
                return
            id, held, entry.held = entry.request.lora_int_id, entry.held, False
            if entry.gone and self.entries.pop(id, None) is None:
                return
            await self._ask("deltacome_drop", id)
        if entry.gone and self.named(entry.name) is None:
            metrics.forgotten(entry.name)
        if held:
            metrics.dropped(entry.name, entry.request.lora_path)

    async def _together(self, work: Callable[[*Ts], Coroutine[Any, Any, T]], *args: *Ts) -> T:
        """The result of work that all who ask for it while it runs wait for together.

        It belongs to no request: copies and reads go on when nobody waits any more, and another attempt
        would have them begun again.
        """
        key = (work, *args)
        if key not in self._shared:
            self._shared[key] = self._start(work(*args))
            self._shared[key].add_done_callback(lambda _: self._shared.pop(key))
        return await asyncio.shield(self._shared[key])

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @property
    def _vocabulary(self) -> dict[str, int]:
        tokenizer = self.models.renderer.tokenizer
        return {} if tokenizer is None else tokenizer.get_vocab()
