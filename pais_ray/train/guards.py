"""What goes wrong slowly, seen in the figures that all ranks share: every rank comes to the same verdict.

Free of Ray and of tensors: floats in, texts out.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping

from pais_ray.config.sections import GuardConfig

WINDOW = 100  # steps whose median gradient norm a spike is measured by: longer than a warm-up's slope

ENOUGH = 20  # norms before a median means anything

# Losses that are zero without instances, where class and objectness learn the background.
OF_INSTANCES = ("labeled/box", "labeled/mask")


class Guards:
    """Watches the figures of a run; each method returns what to tell, or None."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.outside = 0  # steps with pseudo-labels outside their band
        self.zero = 0  # steps with labeled box and mask losses of zero

    def gradient(self, norm: float) -> str | None:
        """A norm far above the recent ones; it joins them all the same: a new level is no spike for long."""
        if not math.isfinite(norm):
            return None
        median = statistics.median(self.norms) if len(self.norms) >= ENOUGH else math.inf
        self.norms.append(norm)
        if norm <= self.config.gradient_spike * median:
            return None
        return f"gradient norm {norm:.3g}, {norm / median:.0f} times the median of the last steps"

    def pseudo_labels(self, kept: float | None, steps: int) -> str | None:
        """Kept pseudo-labels an image over the last ``steps`` steps; told once in every guards.kept_alarm_steps."""
        low, high = self.config.min_kept_per_image, self.config.max_kept_per_image
        if kept is None or low <= kept <= high:
            self.outside = 0
            return None
        before, self.outside = self.outside, self.outside + steps
        if before // self.config.kept_alarm_steps == self.outside // self.config.kept_alarm_steps:
            return None
        what = "hardly any" if kept < low else "too many"
        return (
            f"the teacher may have collapsed: {what} pseudo-labels, {kept:.3g} an image for {self.outside} steps "
            f"(guards.min_kept_per_image {low:g}, guards.max_kept_per_image {high:g}); "
            "look at figures/ and method.tau_cls"
        )

    def teacher(self, teacher: float | None, student: float | None) -> str | None:
        """segm AP of both roles at one evaluation."""
        if teacher is None or student is None or not student - teacher > self.config.teacher_gap:
            return None
        return (
            f"the teacher's segm AP {teacher:.3f} is far below the student's {student:.3f} (guards.teacher_gap "
            f"{self.config.teacher_gap:g}): pseudo-labels are worse than they could be; look at method.ema"
        )

    def labeled_loss(self, values: Mapping[str, float], steps: int) -> str | None:
        """The reason to end, where no labeled image has taught a box or a mask for long enough."""
        losses = [values[k] for k in OF_INSTANCES if k in values]
        if not losses or any(v != 0 for v in losses):
            self.zero = 0
            return None
        self.zero += steps
        if self.zero < self.config.zero_loss_steps:
            return None
        return (
            f"no labeled image has had an instance to learn for {self.zero} steps (guards.zero_loss_steps): box and "
            "mask losses are zero. Do the labeled images have annotations of data.train's classes that are no crowds, "
            "and are method.labeled_weights not zero? See `pais-ray validate`"
        )
