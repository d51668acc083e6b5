"""A Mask R-CNN with scripted faults: `segmentor.name=tests.faults.faulty`.

A fault occurs in a range of global rows, that is, at the same data after any number of restarts. With ``once`` it
occurs in one process only, which leaves a marker file.
"""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from pais_ray.modeling.segmentors.mask_rcnn import MaskRCNN, MaskRCNNConfig
from pais_ray.structures.batch import Predictions


class _Config(MaskRCNNConfig):
    name: Literal["tests.faults.faulty"] = "tests.faults.faulty"  # type: ignore[assignment]
    fault: str = Field(default="none", description="Names of the faults, separated by +.")
    first: tuple[int, ...] = Field(default=(0,), description="First global row of each fault.")
    rows: tuple[int, ...] = Field(default=(1,), description="Number of rows of each fault.")
    once: str | None = Field(default=None, description="Folder of the marker files; each fault occurs once.")


class FaultyMaskRCNN(MaskRCNN):
    Config = _Config

    def is_due(self, fault: str, row: int) -> bool:
        config = self.config
        names = config.fault.split("+")
        if fault not in names:
            return False
        i = names.index(fault)
        if not config.first[i] <= row < config.first[i] + config.rows[i]:
            return False
        if config.once is None:
            return True
        try:
            (Path(config.once) / fault).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def forward(self, views, targets):
        row = int(views.rows[0])
        if self.is_due("stop", row):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.is_due("oom_forward", row):
            raise torch.OutOfMemoryError("asked for 7 GiB, 3 MiB are free")
        losses = super().forward(views, targets)
        if self.is_due("nan_loss", row):
            losses["class"] = losses["class"] * torch.nan
        if self.is_due("zero_loss", row):
            losses = {k: v * 0 if k in ("box", "mask", "mask_iou") else v for k, v in losses.items()}
        if self.is_due("nan_grad", row):
            losses["class"].register_hook(lambda grad: grad * torch.nan)
        if self.is_due("oom_backward", row):
            losses["class"].register_hook(_no_memory)
        return losses

    def predict(self, views, score_threshold=None) -> list[Predictions]:
        row = int(views.rows[0])
        if not self.training and self.is_due("nan_teacher", row):
            views = dataclasses.replace(views, images=views.images * torch.nan)
        found = super().predict(views, score_threshold=score_threshold)
        if self.training or len(views) == 0:
            return found
        if row % 2 and self.is_due("empty", row):  # the rows of the second of two ranks
            return [p[:0] for p in found]
        return found


def _no_memory(grad):
    raise torch.OutOfMemoryError("asked for 7 GiB, 3 MiB are free")
