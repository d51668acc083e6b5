"""The function that Ray Train calls in every worker, in a module that is cheap to import.

Ray waits until all workers have imported the function, and the death of a worker in that time ends the training. Slow
imports come later, when a death is a failure that Ray recovers from.
"""

from typing import Any


def run(loop_config: dict[str, Any]) -> None:
    """Run a worker to its end."""
    from pais_ray.train.worker import worker

    worker.run(loop_config)
