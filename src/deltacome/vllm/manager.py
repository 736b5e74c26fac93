"""vLLM's managers of adapters, extended to tenants.

The worker's manager loads what a request names: an artifact's folder becomes a `Tenant`, anything else
is left to vLLM. The model's manager owns the slots: when a tenant moves into one, its bytes are copied
into the pool and its tables are written. vLLM decides which adapter moves out: the least recently used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltacome.errors import DeltaError, MismatchError, PlanError
from deltacome.format.manifest import MANIFEST_FILE
from deltacome.ops.impls import check_impl, fastest
from deltacome.ops.slots import Pool
from deltacome.runtime.base import Base
from deltacome.vllm import compat
from deltacome.vllm.layers import Delta, NormDelta, install
from deltacome.vllm.mends import mend_heads, one_more_slot
from deltacome.vllm.places import Place, find_places
from deltacome.vllm.refuse import refuse_heads, refuse_impl, refuse_options
from deltacome.vllm.request import artifact_path, content_path, has_digest, is_artifact
from deltacome.vllm.settings import Settings
from deltacome.vllm.step import Step
from deltacome.vllm.tenant import Tenant, check_room, load_tenant


class ModelManager(compat.LRUCacheLoRAModelManager):
    """The slots of one model, for tenants and for ordinary adapters."""

    def __init__(
        self, model: Any, *args: Any, vllm_config: Any, device: Any, **kwargs: Any
    ) -> None:
        self.vllm_config = vllm_config
        self.settings = Settings.parse(vllm_config.additional_config)
        refuse_options(vllm_config)
        mark_compiled(vllm_config)
        super().__init__(model, *args, vllm_config=vllm_config, device=device, **kwargs)
        refuse_heads(vllm_config.model_config, self.places)

    def _create_lora_modules(self) -> None:
        """Hooks every module, before vLLM wraps some of them for its own adapters."""
        device = torch.device(self.device)
        places = find_places(self.model)  # pyright: ignore[reportArgumentType]
        slots = self.lora_slots
        impl = self.settings.impl or fastest(device)
        check_impl("vLLM", impl)
        refuse_impl(impl, device, self.vllm_config.model_config)
        self.evictions = 0
        nbytes = self.settings.slot_bytes or default_slot_bytes(
            places, self.vllm_config.parallel_config.tensor_parallel_size
        )
        self.pool = Pool(slots, nbytes, device=device)
        self.settings = replace(self.settings, slot_bytes=self.pool.blobs_SN.shape[1])
        scheduler = self.vllm_config.scheduler_config
        rows = max(self.max_num_batched_tokens, scheduler.max_num_seqs)
        self.step = Step(slots, rows, device)
        self.places = places
        self.deltas: dict[str, Delta | NormDelta] = {}
        for place in places:
            delta = install(place, self.pool, self.step, impl, self.settings)
            if delta is not None:
                self.deltas[place.name] = delta
        model_config = self.vllm_config.model_config
        # The revision is the served model's; another base has its own, after an @.
        own = self.settings.base
        self.base = Base(own or model_config.model, None if own else model_config.revision)
        if not self.settings.lora:
            self.supported_lora_modules = []
        elif device.type == "cpu":
            with one_more_slot(self.lora_config):
                super()._create_lora_modules()
            mend_heads(self.model)  # pyright: ignore[reportArgumentType]
        else:
            super()._create_lora_modules()

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        if lora_model.loras:
            super()._create_merged_loras_inplace(lora_model)

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, Tenant):
            self._registered_adapters[lora.id] = lora  # pyright: ignore[reportArgumentType]
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Moves an adapter into a slot; a move that fails leaves the slot free."""
        before = [id for id in self.lora_index_to_id if id]
        if not super().activate_adapter(lora_id):
            return False
        adapters = self.list_adapters()
        left = [id for id in before if id not in self.lora_index_to_id]
        self.evictions += sum(isinstance(adapters.get(id), Tenant) for id in left)
        slot = self.lora_index_to_id.index(lora_id)
        adapter = adapters[lora_id]
        try:
            self._fill(slot, adapter if isinstance(adapter, Tenant) else None)
        except BaseException:
            self._active_adapters.pop(lora_id, None)
            self._deactivate_adapter(lora_id)
            raise
        return True

    def _fill(self, slot: int, tenant: Tenant | None) -> None:
        for delta in self.deltas.values():
            delta.clear(slot)
        if tenant is None:
            return
        assert tenant.image is not None
        self.pool.load(slot, 0, tenant.image)
        for place in self.places:
            if place.name in self.deltas:
                self.deltas[place.name].load(slot, tenant, place)

    def _set_adapter_mapping(self, mapping: Any) -> None:
        adapters = self.list_adapters()  # to look one up in the cache itself would count as a use
        slots = {
            id: slot
            for slot, id in enumerate(self.lora_index_to_id)
            if id is not None and isinstance(adapters.get(id), Tenant)
        }
        known = {id for id in self.lora_index_to_id if id is not None} | {0}
        if lost := set(mapping.index_mapping) - known:
            # Without a slot their rows would be computed as the base's.
            raise MismatchError(f"adapters {sorted(lost)} are in the batch but in no slot")
        if mapping.type == compat.LoRAMappingType.LANGUAGE:  # others map an encoder's rows
            self.step.set(
                [slots.get(id, -1) for id in mapping.index_mapping],
                [slots.get(id, -1) for id in mapping.prompt_mapping],
                adapters=any(mapping.index_mapping) or any(mapping.prompt_mapping),
            )
        # To vLLM's own kernels, a tenant's row has no adapter.
        others = compat.LoRAMapping(
            tuple(0 if id in slots else id for id in mapping.index_mapping),
            tuple(0 if id in slots else id for id in mapping.prompt_mapping),
            is_prefill=mapping.is_prefill,
            type=mapping.type,
        )
        super()._set_adapter_mapping(others)

    def tables(self, tenant: Tenant) -> dict[str, Tensor]:
        """What a slot's tables say about a tenant, by place; this becomes its `fields`.

        Raises:
            ArtifactError: it has more bytes than a slot; says what to set.
            PlanError: a plan has too many bands or directions.
        """
        check_room(tenant.path, tenant.nbytes, self.pool.blobs_SN.shape[1])
        fields = {}
        for name, parts in tenant.bands.items():
            delta = self.deltas[name]
            assert isinstance(delta, Delta)
            try:
                fields[name] = delta.bands.fields(0, parts)
            except PlanError as error:
                raise PlanError(
                    f"{tenant.path}: {name}: {error}: set max_bands or max_rank in "
                    "additional_config's deltacome"
                ) from error
        return fields


class Held(NamedTuple):
    """A tenant that the API server asked the worker to read."""

    path: str
    """As requests name it, with the digest of its contents."""
    reading: Future[Tenant]


class WorkerManager(compat.LRUCacheWorkerLoRAManager):
    """Loads artifacts when requests name them.

    What the API server asked to have read is held until the server says otherwise, so within a step of
    the engine there is nothing to read, and nothing that can fail.
    """

    _manager_cls = ModelManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltacome")
        self._held: dict[int, Held] = {}

    def _load_adapter(self, lora_request: Any) -> Any:
        if held := self._held.get(lora_request.lora_int_id):
            if lora_request.lora_path != held.path:
                raise MismatchError(
                    f"{lora_request.lora_path}: adapter {lora_request.lora_int_id} is the tenant that "
                    f"was read from {held.path}"
                )
            return held.reading.result()
        if is_artifact(lora_request.lora_path):
            return self._read(lora_request.lora_int_id, lora_request.lora_path)
        if self._tenants.settings.lora:
            return super()._load_adapter(lora_request)
        raise DeltaError(
            f"{lora_request.lora_path}: expected an artifact ({MANIFEST_FILE}), found none; ordinary "
            "adapters are off (lora is false in additional_config's deltacome)"
        )

    @property
    def _tenants(self) -> ModelManager:
        manager = self._adapter_manager
        assert isinstance(manager, ModelManager)
        return manager

    def _read(self, id: int, path: str) -> Tenant:
        manager: Any = self._tenants
        folder = artifact_path(path)
        tenant = load_tenant(
            id, folder, manager.model, manager.places, manager.base, manager.settings
        )
        # Checked last: if the folder is replaced meanwhile, what was read may come from either.
        if has_digest(path) and content_path(folder) != path:
            raise MismatchError(f"{folder}: holds other weights than {path}")
        tenant.fields = manager.tables(tenant)
        tenant.gather(torch.device(self.device))
        return tenant

    def prefetch(self, id: int, path: str) -> None:
        """Starts reading an artifact in a thread, unless it is held."""
        if id not in self._held:
            self._held[id] = Held(path, self._thread.submit(self._read, id, path))

    def fetched(self, id: int) -> bool | str:
        """Whether a prefetch is done, or why the artifact was refused, after which it is not held."""
        held = self._held.get(id)
        if held is None or not held.reading.done():
            return held is None
        if error := held.reading.exception():
            del self._held[id]
            return f"{type(error).__name__}: {error}"
        return True

    def drop(self, id: int) -> None:
        """Frees an artifact's slot, and its memory in the thread, where that may wait for a GPU."""
        last = [self._held.pop(id, None)]
        self._tenants.remove_adapter(id)
        self._thread.submit(_free, last)

    def figures(self) -> dict[str, int]:
        """What this worker holds, for metrics."""
        manager = self._tenants
        readings = [one.reading for one in self._held.values() if one.reading.done()]
        held = [reading.result() for reading in readings if not reading.exception()]
        adapters = manager.list_adapters()
        slots = [adapters.get(id) for id in manager.lora_index_to_id if id]
        return {
            "resident": sum(isinstance(one, Tenant) for one in slots),
            "held": len(held),
            "held_bytes": sum(tenant.nbytes for tenant in held),
            "slots": manager.lora_slots,
            "slot_bytes": manager.pool.blobs_SN.shape[1],
            "evictions": manager.evictions,
        }


def mark_compiled(vllm_config: Any) -> None:
    """Gives what vLLM compiles from now on other names in its caches than without the plugin.

    vLLM derives the names from the configuration, and a graph compiled without the plugin has no deltas.
    Must be called before the first step, which compiles. The dictionary is changed in place, since copies
    of the configuration share it.
    """
    if vllm_config.additional_config is None:
        vllm_config.additional_config = {}
    version = importlib.metadata.version("deltacome")
    vllm_config.additional_config["deltacome_plugin"] = version


def _free(last: list[Held | None]) -> None:
    """Frees a tenant that nothing else holds, and returns free memory to the system (some 10 ms).

    A tenant's small tensors lie between others in malloc's arenas, and glibc by itself keeps the pages
    that they leave: a worker whose tenants come and go would grow.
    """
    last.clear()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def default_slot_bytes(places: list[Place], workers: int) -> int:
    """The most that this worker has of an artifact of a sixteenth, plus a fifth.

    The fifth is added because papers count codes alone.

    Args:
        places: of this worker.
        workers: number that share each layer. A direction has as many entries as the matrix has rows and
            columns together, of which a worker lacks some rows or some columns: the shorter the side that
            is cut, the fewer.
    """
    entries = 0.0
    for place in places:
        if place.kind != "norm" and not place.tied:
            for part in place.parts:
                rows, columns = part.size, part.columns[1] - part.columns[0]
                cut = rows if place.kind in ("embedding", "head") else min(rows, columns)
                whole = rows + columns + (workers - 1) * cut
                entries += workers * rows * columns * (rows + columns) / whole
    return int(2 * entries / 16 * 1.2)
