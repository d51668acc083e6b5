"""Decoded images to views with their matrices on the training device, and to targets for labeled images.

``draw_view`` draws everything random about the view of one image on the CPU (a ``ViewPlan``, a pure function of a
seed); ``render`` applies plans. Each image pays only for the operations it drew. Pixels are resampled once by an
antialiased resize (images often shrink by a factor of 2 to 4, and plain bilinear sampling would alias) and once more by
a warp if a geometric operation was drawn. Ground truth and pseudo-labels move by the composed matrix.

Legend: N instances, H x W px of the decoded, upright original, h x w px of the view before padding.
"""

import torch
from torch import Tensor

from pais_ray.augmentation import pixel_ops
from pais_ray.augmentation.presets import Kind, ViewConfig, ViewSet
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.sampling import ViewPlan, plan_views
from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions, Targets, Views
from pais_ray.structures.masks import Masks

PAD = 32  # px: view sizes are multiples of the largest stride of an FPN


def render(samples: list[Sample], plans: list[ViewPlan], config: ViewConfig, device: torch.device | str) -> Views:
    """The views of the plans, padded with zeros at the bottom and the right to a common multiple of 32 px."""
    height = max(-(-p.size[0] // PAD) * PAD for p in plans)
    width = max(-(-p.size[1] // PAD) * PAD for p in plans)
    images = torch.zeros(len(plans), 3, height, width, device=device)
    for out, sample, plan in zip(images, samples, plans, strict=True):
        out[:, : plan.size[0], : plan.size[1]] = _view_pixels(sample.image.to(device, non_blocking=True), plan, config)
    return Views(
        images=images,
        sizes=torch.tensor([p.size for p in plans], device=device),
        matrix=torch.stack([p.matrix for p in plans]).float().to(device),
        image_ids=torch.tensor([s.image_id for s in samples]),
        rows=torch.tensor([s.row for s in samples]),
    )


def _view_pixels(image: Tensor, plan: ViewPlan, config: ViewConfig) -> Tensor:
    """One view (3, h, w) float in [0, 1] of a uint8 image (3, H, W) on its device."""
    view = pixel_ops.resize(image.float().div_(255), plan.size)
    if plan.flip:
        view = view.flip(-1)
    for step in plan.steps:
        if step == "color":
            view = pixel_ops.color(view, *plan.color)
        elif step == "geometric":
            view = pixel_ops.warp(view, plan.motion, config.fill)
        else:
            view = pixel_ops.erase(view, plan.patches, config.erase_fill)
    return view


def make_views(samples: list[Sample], views: ViewSet, seed: int, kind: Kind, device: torch.device | str) -> Views:
    """Views of one kind; ``seed`` is the seed of the run. Raises ValueError if there are no samples."""
    if not samples:
        raise ValueError(f"make_views: expected at least one sample for the {kind} view, got none")
    return render(samples, plan_views(samples, views, seed, kind), views[kind], device)


def make_targets(samples: list[Sample], plans: list[ViewPlan], device: torch.device | str) -> list[Targets]:
    """The ground truth of labeled samples in the frame of their plans, without instances that have a side below 1 px.

    Mask grids stay as annotated: a flip reverses their columns, which is exact, and the scale goes into the affine, so
    that they stay upright and RoIAlign can read them. A geometric operation goes into the affine as well. Raises
    ValueError if a sample is not labeled.
    """
    return [_view_targets(sample, plan, device) for sample, plan in zip(samples, plans, strict=True)]


def _view_targets(sample: Sample, plan: ViewPlan, device: torch.device | str) -> Targets:
    if sample.boxes is None or sample.labels is None or sample.masks is None:
        raise ValueError(f"make_targets: expected labeled samples, got image {sample.image_id} without annotations")
    # Small operations run on the CPU, where selecting rows does not wait for a device.
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
    views: ViewSet,
    seed: int,
    device: torch.device | str,
) -> Batch:
    """One micro-batch of the training step. Weak and strong views draw their scale and flip independently.

    Raises ValueError if there are no labeled samples.
    """
    if not labeled:
        raise ValueError("make_batch: expected at least one labeled sample, got none; batch.labeled must be >= 1")
    plans = plan_views(labeled, views, seed, "labeled")
    weak = make_views(unlabeled, views, seed, "weak", device) if unlabeled else None
    return Batch(
        labeled=render(labeled, plans, views["labeled"], device),
        targets=make_targets(labeled, plans, device),
        weak=weak,
        strong=make_views(unlabeled, views, seed, "strong", device) if unlabeled else None,
        scored=None if weak is None else warp_scored_masks(weak, unlabeled),
    )


def warp_scored_masks(weak: Views, samples: list[Sample]) -> list[Predictions] | None:
    """The scored masks of the samples in the frame of the weak views; None if no sample has any.

    Raises ValueError if only some samples have scored masks.
    """
    scored = [sample.scored for sample in samples if sample.scored is not None]
    if not scored:
        return None
    if len(scored) != len(samples):
        raise ValueError(f"warp_scored_masks: expected scored masks for all {len(samples)} samples, got {len(scored)}")
    device = weak.matrix.device
    return [p.to(device).warp(m, size) for p, m, size in zip(scored, weak.matrix, weak.sizes, strict=True)]
