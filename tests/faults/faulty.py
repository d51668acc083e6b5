"""A Mask R-CNN that fails where it is told to: `segmentor.name=tests.faults.faulty`.

Its place is a range of global rows, so that a fault comes at the same data however often the run starts again; with
``once`` it comes in one process only, whose marker file tells the next one.
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
    fault: str = Field(default="none", description="+ between several")
    first: tuple[int, ...] = Field(default=(0,), description="global row at which each begins")
    rows: tuple[int, ...] = Field(default=(1,), description="of each")
    once: str | None = Field(default=None, description="folder of markers: each comes once")


class FaultyMaskRCNN(MaskRCNN):
    Config = _Config

    def due(self, fault: str, row: int) -> bool:
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
        if self.due("stop", row):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.due("oom_forward", row):
            raise torch.OutOfMemoryError("asked for 7 GiB, 3 MiB are free")
        losses = super().forward(views, targets)
        if self.due("nan_loss", row):
            losses["class"] = losses["class"] * torch.nan
        if self.due("zero_loss", row):
            losses = {k: v * 0 if k in ("box", "mask", "mask_iou") else v for k, v in losses.items()}
        if self.due("nan_grad", row):
            losses["class"].register_hook(lambda grad: grad * torch.nan)
        if self.due("oom_backward", row):
            losses["class"].register_hook(_no_memory)
        return losses

    def predict(self, views, score_threshold=None) -> list[Predictions]:
        row = int(views.rows[0])
        if not self.training and self.due("nan_teacher", row):
            views = dataclasses.replace(views, images=views.images * torch.nan)
        found = super().predict(views, score_threshold=score_threshold)
        if self.training or len(views) == 0:
            return found
        if row % 2 and self.due("empty", row):  # of two ranks the second one's rows
            return [p[:0] for p in found]
        return found


def _no_memory(grad):
    raise torch.OutOfMemoryError("asked for 7 GiB, 3 MiB are free")
