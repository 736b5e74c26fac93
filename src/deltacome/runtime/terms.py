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
from deltacome.format.spec import rank
from deltacome.ops.slots import BandTable, PlacedBands, PlacedSigns, Pool, SignTable, arrange
from deltacome.runtime.match import Place
from deltacome.runtime.modules import Tables


class Terms:
    """The terms of artifacts, placed on the devices of the tensors that they belong to."""

    def __init__(self, artifacts: Sequence[Artifact], places: Sequence[Sequence[Place]]) -> None:
        """Reads the packed terms.

        Args:
            artifacts: the tenants'; the index of each is its slot.
            places: each tenant's.
        """
        self.artifacts = artifacts
        groups = {artifact.manifest.group_size for artifact in artifacts}
        if len(groups) > 1:
            raise UnsupportedError(
                f"tenants of one attachment: expected one size of scale groups, got {sorted(groups)}"
            )
        (self.group_size,) = groups
        self._offsets: dict[tuple[int, torch.device, str, str], int] = {}
        self._pools: dict[torch.device, Pool] = {}
        for device in {place.live.device for mine in places for place in mine}:
            self._load(device, places)

    def _load(self, device: torch.device, places: Sequence[Sequence[Place]]) -> None:
        layouts = []
        for mine in places:
            records = {p.record.name: p.record for p in mine if p.live.device == device}
            nbytes = {
                (name, kind): size
                for name, record in records.items()
                for kind, size in record.packed_nbytes(self.group_size).items()
            }
            layouts.append(arrange(nbytes))
        size = max(total for _, total in layouts)
        if not size:
            return
        self._pools[device] = pool = Pool(len(layouts), size, device=device)
        for slot, (offsets, _) in enumerate(layouts):
            for (name, kind), offset in offsets.items():
                pool.load(slot, offset, self.artifacts[slot].blob(name, kind))
                self._offsets[slot, device, name, kind] = offset

    def packed(self, places: Sequence[Place | None]) -> Tables | None:
        """The tables of one matrix; None if no tenant has packed terms for it.

        Args:
            places: the same matrix in each tenant; None where a tenant does not change it.
        """
        here = [place for place in places if place is not None and place.record.packed]
        if not here:
            return None
        device, shape = here[0].live.device, here[0].record.bands_shape
        return Tables(self._bands(places, device, shape), self._signs(places, device, shape))

    def _bands(
        self, places: Sequence[Place | None], device: torch.device, shape: tuple[int, int]
    ) -> BandTable | None:
        plans = [place.record.plan if place is not None else () for place in places]
        if not any(plans):
            return None
        table = BandTable(
            *(self._pools[device], shape[1], [shape[0]]),
            max_rank=max(map(rank, plans)),
            max_bands=max(map(len, plans)),
            group_size=self.group_size,
        )
        for slot, (place, plan) in enumerate(zip(places, plans, strict=True)):
            if place is not None and plan:
                offset = self._offsets[slot, device, place.record.name, "bands"]
                table.load(slot, [PlacedBands(offset, plan)])
        return table

    def _signs(
        self, places: Sequence[Place | None], device: torch.device, shape: tuple[int, int]
    ) -> SignTable | None:
        scales = [place.record.sign_scales if place is not None else None for place in places]
        if not any(scales):
            return None
        table = SignTable(self._pools[device], shape[1], [shape[0]])
        for slot, (place, count) in enumerate(zip(places, scales, strict=True)):
            if place is not None and count:
                offset = self._offsets[slot, device, place.record.name, "signs"]
                table.load(slot, [PlacedSigns(offset, count)])
        return table

    def exact(self, slot: int, place: Place) -> Tensor:
        """Stored rows of a tensor, on the device and in the dtype of its place."""
        value = self.artifacts[slot].exact(place.record.name)
        return value.to(place.live.device, place.live.dtype, copy=True)
