"""TODO docstring."""

from pais_ray.config.overlays import ConfigError
from pais_ray.data.validation.rules import DataError
from pais_ray.runs.checkpoints import CheckpointError, StorageLostError


class TrainingEnded(RuntimeError):
    """Training cannot go on, for the reason that is its message; trying again would come to the same."""


def find_fatal_error(error: BaseException | None) -> Exception | None:
    """The error among the causes of ``error`` that would come again at every try, if there is one."""
    while error is not None:
        if isinstance(error, DataError | ConfigError | CheckpointError | TrainingEnded | StorageLostError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
