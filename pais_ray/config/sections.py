"""The typed sections `batch`, `train`, `guards`, `scaling` and `run` of a Config.

The other sections live beside the code that they configure: `data` in data_section.py of this folder, `views` in
augmentation/presets.py, `optim` in modeling/optim.py, `tracking` in tracking/settings.py, `segmentor` and `method` in
the file of each plugin.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Marks a setting, or all settings of a section, that a resumed run may change. All others are the run's identity.
FREE: dict[str, Any] = {"role": "free"}


class Section(BaseModel):
    """Base of the sections of a Config."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class BatchConfig(Section):
    """The section `batch:`. Image counts are per worker and micro-batch."""

    labeled: int = Field(
        default=1,
        ge=1,
        description="Number of labeled images per worker and micro-batch. Default: from paper 4.2.",
    )
    unlabeled: int = Field(
        default=3,
        ge=0,
        description="Number of unlabeled images per worker and micro-batch. It must be 0 for a method that learns "
        "from labeled images only. Default: from paper 4.2 and Table 9.",
    )
    accumulation_steps: int = Field(
        default=1,
        ge=1,
        description="Number of micro-batches per worker whose gradients are averaged for one optimizer step. It "
        "enlarges the batch without more memory. Default: chosen by this project.",
    )


class TrainConfig(Section):
    """The section `train:`."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="Length of the run, in optimizer steps. Default: null, which means optim.reference.steps scaled so "
        "that the run sees as many images as the reference.",
    )
    stop_at: int | None = Field(
        default=None,
        ge=1,
        description="Step after which the run stops with a checkpoint, even if its schedule is longer. The same "
        "command with a larger value resumes it. Default: null, which means the last step.",
        json_schema_extra=FREE,
    )
    eval_every: int | None = Field(
        default=None,
        ge=1,
        description="Interval between evaluations of teacher and student on the validation images, in optimizer steps. "
        "Default: null, which means after the last step only.",
        json_schema_extra=FREE,
    )
    checkpoint_every: int = Field(
        default=1000,
        ge=1,
        description="Interval between checkpoints, in optimizer steps. A restart repeats at most this many steps. "
        "Default: chosen by this project.",
        json_schema_extra=FREE,
    )
    log_every: int = Field(
        default=50,
        ge=1,
        description="Interval between rows of training metrics, in optimizer steps. A row holds means over the "
        "interval. Default: chosen by this project.",
        json_schema_extra=FREE,
    )
    panel_every: int | None = Field(
        default=None,
        ge=1,
        description="Interval between figures that show the current pseudo-labels, in optimizer steps. Default: null, "
        "which means no such figures.",
        json_schema_extra=FREE,
    )
    keep_checkpoints: int = Field(
        default=3,
        ge=1,
        description="Number of newest checkpoints to keep. The best checkpoint of the teacher and that of the student "
        "are kept as well. Default: chosen by this project.",
        json_schema_extra=FREE,
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of the initial weights, the order of images, the views, and the samplers inside the "
        "network. Default: chosen by this project.",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description="Number format of the forward passes. With fp16 the loss is scaled, as in the released code. "
        "Default: the format that every device supports.",
    )
    deterministic: bool = Field(
        default=False,
        description="Whether PyTorch uses deterministic kernels only, which are slower. Default: chosen by this "
        "project.",
        json_schema_extra=FREE,
    )
    max_pseudo_labels: int = Field(
        default=100,
        ge=1,
        description="Maximum number of pseudo-labels per image, chosen by score. After a backward pass has run out of "
        "memory, the run continues with a lower limit. Default: from torchvision (box_detections_per_img).",
    )
    max_consecutive_skips: int = Field(
        default=20,
        ge=1,
        description="Number of consecutive skipped steps (loss or gradient not finite, or out of memory) after which "
        "the run returns to an earlier checkpoint. Default: chosen by this project.",
        json_schema_extra=FREE,
    )
    threads_per_worker: int | None = Field(
        default=None,
        ge=1,
        description="Number of PyTorch threads per worker. Default: null, which means the CPU cores of a node divided "
        "by its workers. The number is recorded at the start, because it can change results in the last bit.",
        json_schema_extra=FREE,
    )


class ScalingConfig(Section):
    """The section `scaling:`, modeled after ray.train.ScalingConfig."""

    num_workers: int | tuple[int, int] = Field(
        default=1,
        description="Number of training processes, each with its own batch. With a range [least, most], the run uses "
        "as many workers as the cluster has resources for; a step always has as many images as with the largest "
        "number of workers. Default: chosen by this project.",
    )
    resize_check_s: float = Field(
        default=60.0,
        ge=0,
        description="If num_workers is a range: interval between checks whether the cluster has resources for more "
        "workers, in seconds. Default: from Ray.",
    )
    use_gpu: bool = Field(default=False, description="Whether each worker reserves one GPU. Default: from Ray.")
    cpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        description="Number of CPUs that each worker reserves. Default: null, which means at most one, and less if "
        "otherwise no CPU of the cluster would be left for reading data.",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        default="PACK",
        description="Ray's placement strategy for the workers. PACK uses few nodes and less network traffic; SPREAD "
        "uses many nodes. Default: from Ray.",
    )

    @property
    def most(self) -> int:
        """The number of workers if the cluster has resources for all."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def least(self) -> int:
        """The number of workers without which the run does not start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @field_validator("num_workers")
    @classmethod
    def _check_order(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (value, value) if isinstance(value, int) else value
        if not 1 <= least <= most:
            raise ValueError(f"expected a number of at least 1, or an ascending range [least, most], got {value}")
        return value


class RunConfig(Section):
    """The section `run:`, modeled after ray.train.RunConfig."""

    name: str | None = Field(
        default=None,
        description="Name of the run and of its directory. The name of an existing run resumes it. Default: null, "
        "which means a new name made from the segmentor, the method and the time.",
    )
    storage_path: str = Field(
        default="runs",
        description="Folder of the run directories. Every node of the cluster must see it under the same path. "
        "Default: chosen by this project.",
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="Number of times that the workers are restarted after a failure. With -1, there is no limit. "
        "Default: chosen by this project.",
    )

    @field_validator("name")
    @classmethod
    def _check_folder_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w@+=,-][\w@+=,.-]*", value):
            raise ValueError("expected letters, digits and _ - . @ + = , because it names a folder")
        return value


class GuardConfig(Section):
    """The section `guards:`. All defaults are chosen by this project. No guard affects what a healthy run learns."""

    max_rollbacks: int = Field(
        default=3,
        ge=0,
        description="Number of returns to an earlier checkpoint, each after train.max_consecutive_skips skipped "
        "steps, after which the run ends with an error. Default: chosen by this project.",
    )
    gradient_spike: float = Field(
        default=10.0,
        gt=1,
        description="Factor by which a gradient norm must exceed the median of the last 100 steps to be reported as a "
        "spike. Default: chosen by this project.",
    )
    min_kept_per_image: float = Field(
        default=0.02,
        ge=0,
        description="Mean number of pseudo-labels per image below which the teacher counts as collapsed. Default: "
        "chosen by this project.",
    )
    max_kept_per_image: float = Field(
        default=60.0,
        gt=0,
        description="Mean number of pseudo-labels per image above which the teacher counts as collapsed, because it "
        "sees objects everywhere. Default: chosen by this project.",
    )
    kept_alarm_steps: int = Field(
        default=2000,
        ge=1,
        description="Number of optimizer steps outside min_kept_per_image and max_kept_per_image before an alarm, and "
        "between repeated alarms. Default: chosen by this project.",
    )
    teacher_gap: float = Field(
        default=0.1,
        gt=0,
        description="Difference in segm AP, from 0 to 1, by which the teacher may be worse than the student without "
        "an alarm. Default: chosen by this project.",
    )
    zero_loss_steps: int = Field(
        default=500,
        ge=1,
        description="Number of optimizer steps without any labeled box or mask to learn from, after which the run "
        "ends with an error. The usual cause is wrong class labels. Default: chosen by this project.",
    )
    first_batch_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Time limit for building the model and receiving the first batch, in seconds. A rank that exceeds "
        "it is killed and the workers restart. Default: chosen by this project.",
    )
    step_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Time limit for any later step of a rank, in seconds. A rank that exceeds it is killed and the "
        "workers restart. Default: chosen by this project.",
    )
    evaluate_timeout_s: float = Field(
        default=7200.0,
        gt=0,
        description="Time limit for an evaluation on a rank, in seconds. A rank that exceeds it is killed and the "
        "workers restart. Default: chosen by this project.",
    )
    save_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Time limit for writing a checkpoint or for the scores of an evaluation, in seconds. A rank that "
        "exceeds it is killed and the workers restart. Default: chosen by this project.",
    )
