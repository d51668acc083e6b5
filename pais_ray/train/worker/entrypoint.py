"""What Ray Train calls in every worker, in a module that costs nothing to import.

Ray waits until all workers have taken the function up, and a worker that dies meanwhile is the end of the training for
it. What takes seconds to import comes after that, where a death is a failure to recover from.
"""

from typing import Any


def run(loop_config: dict[str, Any]) -> None:
    """One worker's life."""
    from pais_ray.train.worker import loop

    loop.run(loop_config)
