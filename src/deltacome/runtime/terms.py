"""The packed terms of all tenants of an attachment: one pool on each device, one table for each layer.

Blobs go straight from the file into their slot. A tied weight's blob lies there once, and the tables of
embedding and head both point at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltacome.errors import UnsupportedError
from deltacome.format.artifact import Artifact
from deltacome.format.spec import bands_nbytes, rank
from deltacome.ops.slots import BandTable, PlacedBands, Pool, arrange
from deltacome.runtime.match import Place
from deltacome.runtime.modules import Tables


class Terms:
    """What artifacts hold, placed on the devices of the tensors that it belongs to."""

    def __init__(self, artifacts: Sequence[Artifact], places: Sequence[Sequence[Place]]) -> None:
        """Reads the packed terms.

        Args:
            artifacts: of the tenants; their numbers are their slots.
            places: of each tenant.
        """
        self.artifacts = artifacts
        groups = {artifact.manifest.group_size for artifact in artifacts}
        if len(groups) > 1:
            raise UnsupportedError(
                f"tenants of one attachment: expected one size of scale groups, got {sorted(groups)}"
            )
        (self.group_size,) = groups
        self._offsets: dict[tuple[int, str, torch.device], int] = {}
        self._pools: dict[torch.device, Pool] = {}
        for device in {place.live.device for mine in places for place in mine}:
            self._load(device, places)

    def _load(self, device: torch.device, places: Sequence[Sequence[Place]]) -> None:
        layouts = []
        for mine in places:
            records = {p.record.name: p.record for p in mine if p.live.device == device}
            nbytes = {
                name: bands_nbytes(record.bands_shape, record.plan, self.group_size)
                for name, record in records.items()
                if record.plan
            }
            layouts.append(arrange(nbytes))
        size = max(total for _, total in layouts)
        if not size:
            return
        self._pools[device] = pool = Pool(len(layouts), size, device=device)
        for slot, (offsets, _) in enumerate(layouts):
            for name, offset in offsets.items():
                pool.load(slot, offset, self.artifacts[slot].blob(name))
                self._offsets[slot, name, device] = offset

    def packed(self, places: Sequence[Place | None]) -> Tables | None:
        """The tables of one matrix; None if no tenant has packed terms for it.

        Args:
            places: of each tenant, the same matrix; None where a tenant says nothing of it.
        """
        here = [place for place in places if place is not None and place.record.plan]
        if not here:
            return None
        device, shape = here[0].live.device, here[0].record.bands_shape
        table = BandTable(
            *(self._pools[device], shape[1], [shape[0]]),
            max_rank=max(rank(place.record.plan) for place in here),
            max_bands=max(len(place.record.plan) for place in here),
            group_size=self.group_size,
        )
        for slot, place in enumerate(places):
            if place is not None and place.record.plan:
                offset = self._offsets[slot, place.record.name, device]
                table.load(slot, [PlacedBands(offset, place.record.plan)])
        return Tables(table, None)

    def exact(self, slot: int, place: Place) -> Tensor:
        """Stored rows of a tensor, on the device and in the dtype of its place."""
        value = self.artifacts[slot].exact(place.record.name)
        return value.to(place.live.device, place.live.dtype, copy=True)
