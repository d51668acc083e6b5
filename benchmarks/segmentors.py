"""Step time of K-Net and Mask R-CNN on the same images, and the shares of the parts of K-Net.

    python benchmarks/segmentors.py [--preset nano|r50] [--side 192] [--repeats 20] [--device cpu]

Forward, backward and optimizer on 2 images with 10 objects each. The networks take turns; medians and their ratio.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from pais_ray.modeling.segmentors import knet
from pais_ray.modeling.segmentors.knet import KNet, KNetConfig
from pais_ray.modeling.segmentors.mask_rcnn import MaskRCNN, MaskRCNNConfig
from pais_ray.structures.batch import Targets
from pais_ray.structures.masks import Masks

CLASSES, IMAGES, OBJECTS = 80, 2, 10


def scene(side: int, device: str) -> tuple[torch.Tensor, list[Targets]]:
    height, width = side // 32 * 32, side * 5 // 3 // 32 * 32
    g = torch.Generator().manual_seed(0)
    targets = []
    for _ in range(IMAGES):
        low = torch.rand(OBJECTS, 2, generator=g) * 0.7
        boxes = torch.cat([low, low + 0.1 + 0.2 * torch.rand(OBJECTS, 2, generator=g)], dim=1)
        boxes = (boxes * torch.tensor([width, height, width, height])).round()
        masks = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(0, CLASSES, (OBJECTS,), generator=g)
        targets.append(Targets.ground_truth(boxes=boxes, labels=labels, masks=Masks.full(masks)).to(device))
    return torch.rand(IMAGES, 3, height, width, generator=g).to(device), targets


class Clock:
    """Seconds per part of the current step."""

    def __init__(self, device: str) -> None:
        self.device, self.spent = device, defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = function(*args, **kwargs)
            self.spent[name] += self.now() - started
            return result

        return timed

    def now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["nano", "r50"], default="nano")
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, targets = scene(arguments.side, arguments.device)
    settings: dict[str, Any] = {"preset": arguments.preset, "weights": None}
    networks = {
        "mask_rcnn": MaskRCNN(CLASSES, MaskRCNNConfig(**settings)).to(arguments.device),
        "knet": KNet(CLASSES, KNetConfig(**settings)).to(arguments.device),
    }
    clock = Clock(arguments.device)
    knet_network = networks["knet"]
    knet_network.backbone.forward = clock.wrap("backbone + pyramid, forward", knet_network.backbone.forward)
    knet_network.fusion.forward = clock.wrap("fusion, forward", knet_network.fusion.forward)
    for stage in knet_network.stages:
        stage.forward = clock.wrap("3 update stages, forward", stage.forward)
    knet_network._match = clock.wrap("matching: costs and assignment", knet_network._match)
    knet.assign = clock.wrap("  transfer and scipy, within matching", knet.assign)
    knet_network._semantic_loss = clock.wrap("semantic loss, forward", knet_network._semantic_loss)
    times: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    optimizers = {k: torch.optim.AdamW(n.parameters(), lr=1e-4, fused=True) for k, n in networks.items()}
    for i in range(arguments.repeats + 2):
        for name, network in networks.items():
            clock.spent.clear()
            started = clock.now()
            losses = network(images, targets)
            forward = clock.now()
            sum(losses.values()).backward()
            backward = clock.now()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if i < 2:  # the first steps allocate memory
                continue
            times[name].append(clock.now() - started)
            if name == "knet":
                for part, seconds in clock.spent.items():
                    parts[part].append(seconds)
                parts["forward, total"].append(forward - started)
                parts["backward"].append(backward - forward)
    median = {k: statistics.median(v) for k, v in times.items()}
    print(f"{arguments.preset}, {IMAGES} images {tuple(images.shape[-2:])}, {OBJECTS} objects each, {arguments.device}")
    for name, seconds in median.items():
        print(f"{name:10} {1000 * seconds:8.1f} ms per step ({1000 * min(times[name]):.1f} at best)")
    print(f"knet / mask_rcnn: {median['knet'] / median['mask_rcnn']:.2f}")
    for part, seconds in sorted(parts.items(), key=lambda item: -statistics.median(item[1])):
        share = statistics.median(seconds) / median["knet"]
        print(f"  {part:34} {1000 * statistics.median(seconds):8.1f} ms  {share:6.1%}")


if __name__ == "__main__":
    main()
