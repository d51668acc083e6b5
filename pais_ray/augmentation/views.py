"""Decoded images -> views with their matrices, on the training device; labeled ones with their targets.

Two steps: ``draw`` decides everything random about one image's view on the CPU (a ``Plan``, a pure function
of a seed), ``render`` applies plans. Each image pays only for the operations it drew. Pixels are moved once
by an antialiased resize (shrinking 2-4 times is common, plain bilinear sampling would alias) and, only where
a geometric operation was drawn, once more by a warp; truth and pseudo-labels move by the composed matrix.

Legend: N instances, H x W px of the decoded, upright original, h x w px of the view before padding.
"""

import torch
from torch import Tensor

from pais_ray.augmentation import pixel_ops
from pais_ray.augmentation.presets import Kind, ViewConfig, ViewSet
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.sampling import Plan, plan
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions, Targets, Views
from pais_ray.structures.masks import Masks

PAD = 32  # px: the deepest stride of an FPN


def render(samples: list[Sample], plans: list[Plan], config: ViewConfig, device: torch.device | str) -> Views:
    """The pictures of the plans, padded with zeros bottom and right to a common multiple of 32 px."""
    height = max(-(-p.size[0] // PAD) * PAD for p in plans)
    width = max(-(-p.size[1] // PAD) * PAD for p in plans)
    images = torch.zeros(len(plans), 3, height, width, device=device)
    for out, sample, one in zip(images, samples, plans, strict=True):
        out[:, : one.size[0], : one.size[1]] = _picture(sample.image.to(device, non_blocking=True), one, config)
    return Views(
        images=images,
        sizes=torch.tensor([p.size for p in plans], device=device),
        matrix=torch.stack([p.matrix for p in plans]).float().to(device),
        image_ids=torch.tensor([s.image_id for s in samples]),
        rows=torch.tensor([s.row for s in samples]),
    )


def _picture(image: Tensor, plan: Plan, config: ViewConfig) -> Tensor:
    """One view (3, h, w) float in [0, 1] of a uint8 image (3, H, W) on its device."""
    view = pixel_ops.resize(image.float().div_(255), plan.size)
    if plan.flip:
        view = view.flip(-1)
    for step in plan.steps:
        if step == "color":
            view = pixel_ops.color(view, *plan.color)
        elif step == "geometric":
            view = pixel_ops.warp(view, plan.moved, config.fill)
        else:
            view = pixel_ops.erase(view, plan.patches, config.erase_fill)
    return view


def make_views(samples: list[Sample], config: ViewSet, seed: int, kind: Kind, device: torch.device | str) -> Views:
    """Views of one kind; ``seed`` is the run's. Raises ValueError without samples."""
    if not samples:
        raise ValueError(f"make_views: expected at least one sample for the {kind} view, got none")
    return render(samples, plan(samples, config, seed, kind), config[kind], device)


def make_targets(samples: list[Sample], plans: list[Plan], device: torch.device | str) -> list[Targets]:
    """The truth of labeled samples in the frame of their plans, less instances with a side below 1 px there.

    Masks stay as they were annotated: a flip reverses their columns (exact), scale goes into the affine, so
    they remain upright and are read by RoIAlign. A geometric operation goes into the affine as well.
    """
    return [_targets_of(sample, one, device) for sample, one in zip(samples, plans, strict=True)]


def _targets_of(sample: Sample, plan: Plan, device: torch.device | str) -> Targets:
    if sample.boxes is None or sample.labels is None or sample.masks is None:
        raise ValueError(f"make_targets: image {sample.image_id} has no truth; expected a labeled sample")
    # All small work on the CPU, where selecting rows waits for no device.
    size = torch.tensor(plan.size)
    boxes = geometry.clip_boxes(geometry.transform_boxes(sample.boxes.double(), plan.matrix), size).float()
    keep = (boxes[:, 2:] - boxes[:, :2] >= 1.0).all(dim=1)
    grids = sample.masks if bool(keep.all()) else sample.masks[keep]
    if "geometric" in plan.steps:
        masks = Masks.full(grids.to(device)).warp(plan.matrix)
    else:
        height, width = sample.image.shape[1:]
        affine = geometry.scale(plan.size[1] / width, plan.size[0] / height).float().to(device)
        grids = grids.to(device, non_blocking=True)
        masks = Masks(grids=grids.flip(-1) if plan.flip else grids, affine=affine.expand(len(grids), 3, 3))
    return Targets.ground_truth(boxes=boxes[keep].to(device), labels=sample.labels[keep].to(device), masks=masks)


def make_batch(
    labeled: list[Sample],
    unlabeled: list[Sample],
    config: ViewSet,
    seed: int,
    device: torch.device | str,
) -> Batch:
    """Everything one rank needs for one step. Weak and strong views draw scale and flip independently."""
    if not labeled:
        raise ValueError("make_batch: expected at least one labeled sample, got none; batch.labeled must be >= 1")
    plans = plan(labeled, config, seed, "labeled")
    weak = make_views(unlabeled, config, seed, "weak", device) if unlabeled else None
    return Batch(
        labeled=render(labeled, plans, config["labeled"], device),
        targets=make_targets(labeled, plans, device),
        weak=weak,
        strong=make_views(unlabeled, config, seed, "strong", device) if unlabeled else None,
        scored=None if weak is None else warp_scored_masks(weak, unlabeled),
    )


def warp_scored_masks(weak: Views, samples: list[Sample]) -> list[Predictions] | None:
    """The masks from elsewhere in the frame of the weak views, where the samples have any."""
    given = [sample.scored for sample in samples if sample.scored is not None]
    if not given:
        return None
    if len(given) != len(samples):
        raise ValueError(f"scored_in: expected masks from elsewhere for all {len(samples)} samples, got {len(given)}")
    device = weak.matrix.device
    return [p.to(device).warp(m, size) for p, m, size in zip(given, weak.matrix, weak.sizes, strict=True)]
