"""Export of one role of a run to a folder: safetensors and config, and ONNX with a runner and a measured parity.

The folder is a checkpoint of one role that ``open_exported`` reads; run.py in it does not need torch. The whole
prediction is one graph for images of any size, one image per call: padding images of different sizes to a common size
would change the statistics of group norms, and thus the predictions.

Legend: H x W px of a padded view.
"""

import json
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pais_ray.augmentation.views import PAD
from pais_ray.config.tree import Config, dump, load
from pais_ray.data.annotations import ground_truth
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.reader import Reader
from pais_ray.data.stream.samples import read_image
from pais_ray.evaluation.scoring import score
from pais_ray.inference.export import onnx_runner
from pais_ray.inference.export.onnx_runner import FORMAT, MODEL, Detector
from pais_ray.inference.predictor import Predictor, choose_checkpoint, predict_records
from pais_ray.modeling import registry
from pais_ray.modeling.protocols import Exportable, ExportGraph, Segmentor
from pais_ray.runs.checkpoints import MANIFEST, ROLES, load_segmentor, write_manifest

OPSET = 18  # the exporter writes it directly; others are converted from it
EXAMPLE = (160, 192)  # px of the traced view; height and width differ on every level of the feature pyramid
RAW_IMAGES, RAW_TOLERANCE = 5, 1e-3  # number of images whose raw outputs are compared; largest allowed difference
AP_TOLERANCE = 1e-3
RUNNER = "run.py"  # name of onnx_runner.py in the folder


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences between ONNX and PyTorch, both on the CPU in fp32."""

    raw_images: int
    raw: dict[str, float]  # output -> largest absolute difference
    images: int  # number of validation images that AP is computed on
    pytorch: dict[str, float | None]  # segm_AP, bbox_AP
    onnx: dict[str, float | None]

    @property
    def holds(self) -> bool:
        """Whether every difference is within its tolerance. An AP that is missing must be missing on both sides."""
        close = [
            a == b or (a is not None and b is not None and abs(a - b) <= AP_TOLERANCE)
            for a, b in zip(self.pytorch.values(), self.onnx.values(), strict=True)
        ]
        return all(close) and all(value <= RAW_TOLERANCE for value in self.raw.values())  # False for NaN


def export(
    run: Path,
    out: Path,
    *,
    role: str = "teacher",
    checkpoint: str = "best",
    onnx: bool = True,
    images: int | None = None,
) -> dict[str, Any]:
    """Write the folder ``out`` and return its manifest.

    ``images`` limits the number of validation images that AP is compared on. Raises ValueError if a package is
    missing, the segmentor has no graph, or the test view is random.
    """
    folder = choose_checkpoint(run, role, checkpoint)
    predictor = Predictor.open(run, role=role, checkpoint=str(folder), device="cpu")
    facts: dict[str, Any] = {
        "segmentor": predictor.config.segmentor.name,
        "role": role,
        "run": run.resolve().name,
        "step": json.loads((folder / "state.json").read_text())["step"],
        "categories": predictor.categories,
    }
    if onnx:
        facts["onnx"] = describe_onnx(predictor)
    names = write_weights(predictor, out, role)
    if not onnx:
        return write_manifest(out, names, facts)
    click.echo("exporting the graph", err=True)
    write_graph(predictor.segmentor, out / MODEL)
    shutil.copyfile(onnx_runner.__file__, out / RUNNER)
    write_manifest(out, [*names, MODEL], facts)  # the runner reads it when the parity is measured
    parity = measure_parity(predictor, Detector(out), images)
    facts["parity"] = asdict(parity) | {"holds": parity.holds}
    return write_manifest(out, [*names, MODEL], facts)


def describe_onnx(predictor: Predictor) -> dict[str, Any]:
    """The entry of the ONNX file in the manifest. Raises ValueError if the file cannot be exported."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ValueError(
            f"{error}; install the packages with `pip install pais-ray[export]`, or use --format safetensors"
        ) from error
    graph_of(predictor.segmentor)
    modules = {"torch": torch, "onnx": onnx, "onnxscript": onnxscript, "onnxruntime": onnxruntime}
    return {
        "format": FORMAT,
        "opset": OPSET,
        "size": f"any, padded to multiples of {PAD} px",
        "input": view_parameters(predictor.config),
        "versions": {name: module.__version__ for name, module in modules.items()},
    }


def write_weights(predictor: Predictor, out: Path, role: str) -> list[str]:
    """Write weights and config in place of an earlier export; return the names of the files."""
    if (out / "state.json").exists():
        raise ValueError(f"--out: expected a folder for the export, got the checkpoint {out}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, MODEL, RUNNER, *(f"{r}.safetensors" for r in ROLES)):
        (out / name).unlink(missing_ok=True)
    names = [f"{role}.safetensors", "config.yaml"]
    save_file({k: v.contiguous() for k, v in predictor.segmentor.state_dict().items()}, out / names[0])
    (out / names[1]).write_text(dump(predictor.config))
    return names


def open_exported(folder: Path, device: str = "cpu") -> Predictor:
    """The segmentor of an exported folder, from its safetensors and config. Raises ValueError if a file is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: expected a folder that `pais-ray export` wrote, got no {MANIFEST}") from error
    config, categories = load(folder / "config.yaml"), manifest["categories"]
    segmentor = registry.segmentor(config.segmentor.name)(len(categories), config.segmentor, pretrained=False)
    load_segmentor(segmentor, folder, manifest["role"])
    target = torch.device(device)
    return Predictor(segmentor=segmentor.to(target).eval(), config=config, categories=categories, device=target)


def view_parameters(config: Config) -> dict[str, int]:
    """How the runner makes a view. Raises ValueError if the test view is random or changes colors."""
    view = config.scaled_views["test"]
    short, last = view.short_side
    if short != last or view.flip or view.color or view.geometric or view.erase:
        raise ValueError(
            "views.test: expected one short_side and no flip, color, geometric or erase, got a random view; "
            "set views.test to a fixed size"
        )
    return {"short_side": short, "long_side": view.long_side, "multiple": PAD}


def graph_of(segmentor: Segmentor) -> ExportGraph:
    """The prediction of ``segmentor`` as a graph. Raises ValueError if it cannot be exported."""
    if not isinstance(segmentor, Exportable):
        raise ValueError(f"{type(segmentor).__name__}: expected a method graph(), got none; use --format safetensors")
    return segmentor.graph()


def write_graph(segmentor: Segmentor, path: Path) -> None:
    """Write the segmentor's graph() as ONNX, for one image of any size."""
    from onnxscript import opset18 as op

    def stable_sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        # TopK returns equal values in the order of their indices.
        count = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, count, axis=dim, largest=descending)

    graph = graph_of(segmentor).eval()
    example = (torch.rand(1, 3, *EXAMPLE), torch.tensor([[EXAMPLE[0] - 10, EXAMPLE[1] - 10]]))
    height, width = torch.export.Dim("height"), torch.export.Dim("width")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch and torchvision
        names = list(graph(*example))
        program = torch.onnx.export(
            graph,
            example,
            input_names=["images", "size"],
            output_names=names,
            dynamic_shapes=({2: PAD * height, 3: PAD * width}, None),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path)


def measure_parity(predictor: Predictor, detector: Detector, images: int | None = None) -> Parity:
    """Compare raw outputs on ``RAW_IMAGES`` validation images, and AP on the first ``images``, by default on all.

    Shows a progress bar.
    """
    dataset = predictor.validation()
    records = dataset.records[:images]
    train = predictor.config.train.model_copy(update={"precision": "fp32"})
    config = predictor.config.model_copy(update={"train": train})
    ids = [c["id"] for c in predictor.categories]
    raw: dict[str, float] = {}
    for record in records[:RAW_IMAGES]:
        found = raw_differences(predictor.segmentor, detector, read_image(record))
        raw = {name: float(np.maximum(value, raw.get(name, 0.0))) for name, value in found.items()}  # keeps NaN
    truth = ground_truth.load_ground_truth(dataset.truth, [r.image_id for r in records])
    ours = list(
        predict_records(predictor.segmentor, _with_progress_bar(records, "PyTorch"), config, ids, predictor.device)
    )
    reader = Reader()
    theirs = [
        e for r in _with_progress_bar(records, "ONNX") for e in detector.results(read_image(r, reader), r.image_id)
    ]
    return Parity(
        raw_images=len(records[:RAW_IMAGES]),
        raw=raw,
        images=len(records),
        pytorch=_average_precision(truth, ours),
        onnx=_average_precision(truth, theirs),
    )


def raw_differences(segmentor: Segmentor, detector: Detector, image: np.ndarray) -> dict[str, float]:
    """The largest absolute difference of each raw output on one image (H, W, 3) uint8."""
    images, size = detector.view(image)
    names = [output.name for output in detector.session.get_outputs()]
    values = detector.session.run(names, {"images": images, "size": size})
    found = {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}
    expected = graph_of(segmentor).heads(torch.from_numpy(images), torch.from_numpy(size), found)
    return {name: _max_abs(found[name] - value) for name, value in expected.items()}


def parity_table(parity: dict[str, Any]) -> str:
    """The entry ``parity`` of the manifest as text."""
    lines = [f"{'':34}{'PyTorch':>9}{'ONNX':>9}{'difference':>12}{'allowed':>9}"]
    for name, value in parity["raw"].items():
        label = f"{name}, {parity['raw_images']} images"
        lines.append(f"{label:34}{'':18}{value:>12.1e}{RAW_TOLERANCE:>9g}")
    for name, ours in parity["pytorch"].items():
        theirs, label = parity["onnx"][name], f"{name.replace('_', ' ')}, {parity['images']} images"
        if ours is None or theirs is None:
            lines.append(
                f"{label:34}{'-' if ours is None else f'{ours:.4f}':>9}{'-' if theirs is None else f'{theirs:.4f}':>9}"
            )
        else:
            lines.append(f"{label:34}{ours:>9.4f}{theirs:>9.4f}{abs(ours - theirs):>12.1e}{AP_TOLERANCE:>9g}")
    return "\n".join(lines)


def _average_precision(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float | None]:
    scores = score(truth, results)
    return {f"{kind}_AP": scores[kind]["AP"] for kind in ("segm", "bbox")}


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _with_progress_bar(records: Iterable[Record], label: str) -> Iterator[Record]:
    with click.progressbar(records, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield from bar
