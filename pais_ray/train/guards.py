"""Guards: alarms about slow failures, from metrics that are the same on all ranks, so all ranks decide alike.

Independent of Ray and of tensors: numbers in, messages out.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping

from pais_ray.config.sections import GuardConfig

WINDOW = 100  # steps of the median gradient norm; longer than the slope of a warm-up
MIN_NORMS = 20  # norms before there is a median
INSTANCE_LOSSES = ("labeled/box", "labeled/mask")  # zero without instances; the class losses still learn background


class Guards:
    """Tracks the metrics of a run. Each method returns a message if something is wrong, else None."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.steps_outside = 0  # consecutive steps whose number of pseudo-labels is outside the limits
        self.steps_without_instances = 0  # consecutive steps whose labeled box and mask losses are zero

    def gradient(self, norm: float) -> str | None:
        """Check for a gradient norm far above the median of the recent ones.

        Spikes enter the median too, so that a permanently higher level ends the alarm.
        """
        if not math.isfinite(norm):
            return None
        median = statistics.median(self.norms) if len(self.norms) >= MIN_NORMS else math.inf
        self.norms.append(norm)
        if norm <= self.config.gradient_spike * median:
            return None
        return f"gradient norm {norm:.3g} is {norm / median:.0f} times the median of the last steps"

    def pseudo_labels(self, kept: float | None, steps: int) -> str | None:
        """Check the pseudo-labels kept per image over the last ``steps`` steps; None if the method has none.

        The alarm is given once per `guards.kept_alarm_steps`.
        """
        low, high = self.config.min_kept_per_image, self.config.max_kept_per_image
        if kept is None or low <= kept <= high:
            self.steps_outside = 0
            return None
        before = self.steps_outside
        self.steps_outside += steps
        if before // self.config.kept_alarm_steps == self.steps_outside // self.config.kept_alarm_steps:
            return None
        amount = "hardly any" if kept < low else "too many"
        return (
            f"the teacher may have collapsed: {amount} pseudo-labels, {kept:.3g} per image for {self.steps_outside} "
            f"steps (guards.min_kept_per_image {low:g}, guards.max_kept_per_image {high:g}); "
            "check the figures and the thresholds of the method"
        )

    def teacher(self, teacher: float | None, student: float | None) -> str | None:
        """Check the segm AP of both roles at one evaluation."""
        if teacher is None or student is None or not student - teacher > self.config.teacher_gap:
            return None
        return (
            f"the teacher's segm AP {teacher:.3f} is far below the student's {student:.3f} (guards.teacher_gap "
            f"{self.config.teacher_gap:g}), so its pseudo-labels are worse than necessary; check method.ema"
        )

    def labeled_loss(self, values: Mapping[str, float], steps: int) -> str | None:
        """Return the reason to end the run if the labeled images have had no instances for too long."""
        losses = [values[name] for name in INSTANCE_LOSSES if name in values]
        if not losses or any(loss != 0 for loss in losses):
            self.steps_without_instances = 0
            return None
        self.steps_without_instances += steps
        if self.steps_without_instances < self.config.zero_loss_steps:
            return None
        return (
            f"no labeled image had an instance for {self.steps_without_instances} steps (guards.zero_loss_steps): box "
            "and mask losses are zero. Check that the labeled images have annotations of the classes of data.train "
            "that are not crowds (`pais-ray validate`), and that method.labeled_weights are not zero"
        )
