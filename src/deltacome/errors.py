"""The one tree of errors that deltacome raises.

A caller catches `DeltaError` and shows its message: each names the tensor or file,
what was expected and what was got. Anything else that escapes is a bug.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DeltaError(Exception):
    """Base of every refusal. The command line prints it and exits with 1."""


class CheckpointError(DeltaError):
    """A dense checkpoint is missing, truncated, of an unknown layout, or holds NaN or Inf."""


class MismatchError(DeltaError):
    """Two things that must belong together do not: base and tuned, base and artifact."""


class ArtifactError(DeltaError):
    """An artifact on disk is truncated, inconsistent, or of a schema that this version cannot read."""


class OutputError(DeltaError):
    """An output exists already, cannot be written, or another process is writing it."""


class DeviceError(DeltaError):
    """A device is unknown to torch, or there is none of it."""


class PlanError(DeltaError):
    """A plan or a ratio cannot be met."""


class CalibrationError(DeltaError):
    """Calibration inputs are empty or give a gram that cannot be used."""


class PictureError(DeltaError):
    """A picture of a chat is missing, belongs nowhere, or there is no processor that takes it."""


class UnsupportedError(DeltaError):
    """A model has a structure that is not covered; nothing is skipped in silence."""


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Errors of the numerics, which know no names, get those of the tensors at hand."""
    try:
        yield
    except DeltaError as error:
        raise type(error)(f"{', '.join(names)}: {error}") from error
