"""The one tree of errors that deltacome raises.

A caller catches `DeltaError` and shows its message, which names the tensor or file,
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
    """An output already exists, cannot be written, or is being written by another process."""


class DeviceError(DeltaError):
    """A device is unknown to torch, or there is no such device here."""


class PlanError(DeltaError):
    """A plan or a ratio cannot be met."""


class CalibrationError(DeltaError):
    """Calibration inputs are empty or give a gram that cannot be used."""


class PictureError(DeltaError):
    """A chat's picture is missing or has no place in it, or no processor takes it."""


class UnsupportedError(DeltaError):
    """A model has a structure that is not supported; nothing is skipped silently."""


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Adds tensor names to errors of the numerics, which do not know them."""
    try:
        yield
    except DeltaError as error:
        raise type(error)(f"{', '.join(names)}: {error}") from error
