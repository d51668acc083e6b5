"""Waiting for an event in a test, without a fixed sleep."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

POLL_INTERVAL = 0.1  # s


def wait_for(event: Callable[[], Result], is_running: Callable[[], bool] = lambda: True) -> Result:
    """Poll ``event`` until its result is true, and return the result.

    The timeout of the test bounds the wait. Fails if ``is_running`` becomes false first: the process that should
    cause the event has ended.
    """
    while not (result := event()):
        assert is_running(), "the process ended before the expected event"
        time.sleep(POLL_INTERVAL)
    return result
