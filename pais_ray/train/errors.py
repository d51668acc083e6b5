"""Errors that end training for good, as opposed to failures after which the workers restart."""

from pais_ray.config.overlays import ConfigError
from pais_ray.data.validation.rules import DataError
from pais_ray.runs.checkpoints import CheckpointError


class StorageLostError(RuntimeError):
    """A worker cannot read the run directory, or the last checkpoint of a run could not be written."""


class TrainingEnded(RuntimeError):
    """Training cannot continue for the reason in the message; a restart would end in the same way."""


def find_fatal_error(error: BaseException | None) -> Exception | None:
    """Return the first error in the chain of causes of ``error`` that would recur after a restart, if there is one."""
    while error is not None:
        if isinstance(error, DataError | ConfigError | CheckpointError | TrainingEnded | StorageLostError):
            return error
        error = getattr(error, "cause", None) or error.__cause__  # ``cause``: Ray's errors of tasks
    return None
