"""A small model, training state and batches for tests: nano Mask R-CNN on 64 px images with two classes."""

import torch

from pais_ray.augmentation.presets import AugmentConfig
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_batch
from pais_ray.modeling.optim import OptimConfig, Schedule, build_optimizer, plan_schedule
from pais_ray.modeling.segmentors.mask_rcnn import MaskRCNN, MaskRCNNConfig
from pais_ray.train.state import Teacher, TrainState

LR = 0.01


def tiny_schedule(lr: float = LR) -> Schedule:
    optim = OptimConfig(lr=lr, schedule="constant", warmup_ratio=1.0)
    return plan_schedule(optim, optim.reference, steps=20, images_per_step=4)


def state_of(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    student = MaskRCNN(2, MaskRCNNConfig(preset="nano", weights=None))
    student.train()
    optimizer = build_optimizer(student.named_parameters(), OptimConfig(lr=LR), tiny_schedule())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(student=student, teacher=Teacher(student), optimizer=optimizer, scaler=scaler)


def sample(g: int, slot: int, labeled: bool) -> Sample:
    """A 64 px image of noise with one bright square, which is annotated if the image is labeled."""
    noise = torch.Generator().manual_seed(1000 * g + slot)
    image = torch.randint(0, 120, (3, 64, 64), generator=noise, dtype=torch.uint8)
    x, y, side = 8 + 5 * slot, 10 + g % 9, 28
    image[:, y : y + side, x : x + side] = 230
    if not labeled:
        return Sample(image=image, image_id=100 + g, row=g, slot=slot)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, y : y + side, x : x + side] = 1
    box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
    return Sample(image=image, image_id=g, row=g, slot=slot, boxes=box, labels=torch.tensor([g % 2]), masks=mask)


def tiny_batch(g: int = 0, unlabeled: int = 2):
    """The batch of row g: one labeled and ``unlabeled`` unlabeled images."""
    views = AugmentConfig().at_size(64)
    return make_batch(
        [sample(g, 0, True)], [sample(g, 1 + i, False) for i in range(unlabeled)], views, seed=0, device="cpu"
    )
