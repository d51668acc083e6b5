"""Exported models: ONNX and its runner agree with PyTorch at any image size, and damaged files are refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pycocotools import mask as mask_utils

from pais_ray.augmentation.presets import AugmentConfig
from pais_ray.augmentation.sample import Sample
from pais_ray.augmentation.views import make_batch, make_views
from pais_ray.cli import main
from pais_ray.config.tree import compose, run_schedule
from pais_ray.data.annotations.records import LabeledRecord
from pais_ray.data.annotations.rle import decode_rle, to_rles
from pais_ray.data.images import images
from pais_ray.evaluation.scoring import score
from pais_ray.inference.export import export, onnx_runner
from pais_ray.inference.predictor import Predictor, predict_sample
from pais_ray.runs.checkpoints import CheckpointError, checkpoint_folder, verify
from pais_ray.runs.directory import write_run_directory
from pais_ray.runs.prepare import prepare
from pais_ray.structures.masks import Masks
from pais_ray.train.state import build_state
from pais_ray.train.step import StepSettings, train_step

pytestmark = pytest.mark.timeout(900)  # the exporter takes 25 s of a core, more on a busy machine

STEPS = 12
SIZES = [(96, 96), (40, 400), (300, 64), (1, 1), (7, 5), (121, 187)]  # (h, w) px of images


def make_run(folder: Path, data: Path, segmentor: str, steps: int) -> Path:
    """A run directory as `pais-ray train` leaves it, of a segmentor after ``steps`` steps. After at least one step, the
    score threshold leaves one of the images without instances."""
    paths = [f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images"]
    words = ["synthetic", segmentor, "supervised_plain", *paths, "data.labeled=1", "data.image_size=80"]
    config, prepared = prepare(compose([*words, "method.ema=0.5"]))
    schedule = dataclasses.replace(run_schedule(config), warmup=1)
    state = build_state(config, schedule, len(prepared.train.categories), "cpu")
    settings = StepSettings(schedule=schedule, clip_norm=config.optim.clip_norm)
    for g in range(steps):
        batch = make_batch([labeled_sample(prepared.labeled[g % 4], g)], [], config.scaled_views, 0, "cpu")
        train_step(state, state.student, [batch], config.method, settings)
    if steps:
        views = [
            make_views([Sample.of(p, image_id=0)], config.scaled_views, 0, "test", "cpu")
            for p in pictures(prepared.val)
        ]
        lowest, second = sorted(max(state.teacher.predict(v)[0].scores.tolist(), default=0.0) for v in views)[:2]
        segmentor_config = config.segmentor.model_copy(update={"score_threshold": (lowest + second) / 2})
        config = config.model_copy(update={"segmentor": segmentor_config})
    write_run_directory(folder, config, prepared, schedule)
    state.save(checkpoint_folder(folder, steps))
    return folder


def pictures(records) -> list[np.ndarray]:
    """One image of each of SIZES, resized from images of ``records``."""
    found = []
    for i, (height, width) in enumerate(SIZES):
        path = records[i % len(records)].path
        picture = Image.fromarray(images.decode(Path(path).read_bytes(), path))
        found.append(np.array(picture.resize((width, height))))
    return found


def labeled_sample(record: LabeledRecord, g: int) -> Sample:
    picture = images.decode(Path(record.path).read_bytes(), record.path)
    masks = decode_rle(record.rles, record.height, record.width)
    truth = {"boxes": record.boxes, "labels": record.labels, "masks": masks}
    return Sample.of(picture, image_id=record.image_id, row=g, **truth)


@pytest.fixture(scope="module", params=["mask_rcnn", "knet"])
def exported(request, tmp_path_factory, tiny_coco):
    folder = tmp_path_factory.mktemp(request.param)
    run = make_run(folder / "run", tiny_coco, request.param, STEPS)
    out, report = folder / "out", folder / "report.json"
    done = CliRunner().invoke(main, ["export", str(run), "--out", str(out), "--json", str(report)])
    assert done.exit_code == 0, done.output
    return SimpleNamespace(
        run=run,
        out=out,
        printed=done.output,
        manifest=json.loads(report.read_text()),
        detector=onnx_runner.Detector(out),
        predictor=(predictor := Predictor.open(run, device="cpu")),
        pictures=pictures(predictor.validation().records),
    )


def test_raw_outputs_agree_at_every_size(exported):
    for picture in exported.pictures:
        differences = export.raw_differences(exported.predictor.segmentor, exported.detector, picture)
        assert max(differences.values()) <= export.RAW_TOLERANCE, (picture.shape, differences)


def test_the_runner_predicts_the_same_as_the_predictor(exported):
    counts = []
    for picture in exported.pictures:
        ours = of_pytorch(exported.predictor, picture)
        theirs = exported.detector.results(picture, 7)
        counts.append(len(ours))
        assert [(e["image_id"], e["category_id"]) for e in ours] == [(e["image_id"], e["category_id"]) for e in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert b["score"] == pytest.approx(a["score"], abs=1e-3)
            assert b["mask_iou"] == pytest.approx(a["mask_iou"], abs=1e-3)
            assert b["bbox"] == pytest.approx(a["bbox"], abs=0.05)
            assert b["segmentation"]["size"] == a["segmentation"]["size"]
            masks = [mask_utils.decode(to_rles([e["segmentation"]], *picture.shape[:2])[0]) for e in (a, b)]
            assert (masks[0] != masks[1]).sum() <= 0.01 * masks[0].size
    assert 0 in counts
    assert sum(counts) > 10


def of_pytorch(predictor: Predictor, picture: np.ndarray):
    ids = [c["id"] for c in predictor.categories]
    return predict_sample(predictor.segmentor, Sample.of(picture, image_id=7), predictor.config, ids, predictor.device)


def test_the_manifest_describes_the_export_and_its_parity(exported):
    manifest, parity = exported.manifest, exported.manifest["parity"]
    assert parity["holds"]
    assert parity["images"] == parity["raw_images"] == 4
    assert set(parity["pytorch"]) == set(parity["onnx"]) == {"segm_AP", "bbox_AP"}
    assert "segm AP, 4 images" in exported.printed
    assert (manifest["role"], manifest["step"], manifest["run"]) == ("teacher", STEPS, "run")
    assert [c["id"] for c in manifest["categories"]] == [0, 2, 3, 5, 9, 10]
    names = {"config.yaml", "manifest.json", "model.onnx", "run.py", "teacher.safetensors"}
    assert {p.name for p in exported.out.iterdir()} == names
    assert exported.detector.session.get_inputs()[0].shape == [1, 3, "32*height", "32*width"]


def test_safetensors_and_config_give_the_same_segmentor(exported):
    again = export.open_exported(exported.out)
    own = exported.predictor.segmentor.state_dict()
    assert again.segmentor.state_dict().keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in again.segmentor.state_dict().items())
    assert again.categories == exported.predictor.categories
    picture = exported.pictures[0]
    assert of_pytorch(again, picture) == of_pytorch(exported.predictor, picture)


def test_the_graph_of_another_model_has_no_parity(exported):
    other = export.open_exported(exported.out)
    with torch.no_grad():
        for parameter in other.segmentor.backbone.fpn.parameters():
            parameter.mul_(1.5)
    parity = export.measure_parity(other, exported.detector, images=2)
    assert not parity.holds
    assert (parity.images, parity.raw_images) == (2, 2)


def test_the_runner_works_without_the_package(exported, tmp_path):
    Image.fromarray(exported.pictures[5]).save(tmp_path / "picture.png")
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "assert not {'torch', 'pais_ray', 'cv2', 'scipy', 'pycocotools'} & set(sys.modules)"
    words = [str(exported.out / "run.py"), "picture.png", "--score", "0", "--draw", "drawn"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["score"] for e in lines] == [e["score"] for e in exported.detector.results(exported.pictures[5], 0)]
    assert Image.open(tmp_path / "drawn" / "picture.png").size == (187, 121)


def test_invalid_images_are_refused_by_the_runner(exported):
    for picture, message in [
        (np.zeros((4, 4, 3), np.float32), r"uint8 RGB, got float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"got uint8 \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        ([[1]], "got list"),
    ]:
        with pytest.raises(ValueError, match=message):
            exported.detector.predict(picture)


def test_a_damaged_folder_is_refused(exported, tmp_path):
    def copy(**changes):
        for path in exported.out.iterdir():
            data = path.read_bytes()
            (tmp_path / path.name).write_bytes(changes.get(path.name.split(".")[0], lambda d: d)(data))
        return tmp_path

    with pytest.raises(ValueError, match=r"got no manifest\.json"):
        onnx_runner.Detector(tmp_path)
    with pytest.raises(ValueError, match="differs from its manifest"):
        onnx_runner.Detector(copy(model=lambda d: d[:-1] + bytes([d[-1] ^ 1])))
    with pytest.raises(ValueError, match="got 9"):
        onnx_runner.Detector(
            copy(manifest=lambda d: d.replace(b'"onnx": {\n  "format": 1', b'"onnx": {\n  "format": 9'))
        )
    with pytest.raises(ValueError, match="expected the manifest"):
        onnx_runner.Detector(copy(manifest=lambda d: b"{}"))
    with pytest.raises(CheckpointError, match="does not match its manifest"):
        export.open_exported(copy(teacher=lambda d: d[:-1]))


@pytest.mark.parametrize("size", [*SIZES, (1000, 90), (9, 1000)])
def test_the_view_of_the_runner_is_the_test_view(size):
    config = AugmentConfig().at_size(96)
    view = config["test"]
    detector = object.__new__(onnx_runner.Detector)
    detector.manifest = {"onnx": {"input": export.view_parameters(SimpleNamespace(scaled_views=config))}}
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    images_, valid = detector.view(picture)
    expected = make_views([Sample.of(picture, image_id=0)], config, 0, "test", "cpu")
    assert valid.tolist() == expected.sizes.tolist()
    assert max(valid[0]) <= view.long_side
    torch.testing.assert_close(torch.from_numpy(images_), expected.images, rtol=0, atol=5e-5)  # one gray level is 4e-3


def test_a_random_test_view_is_refused():
    with pytest.raises(ValueError, match=r"views\.test: expected one short_side"):
        export.view_parameters(SimpleNamespace(scaled_views=AugmentConfig(test={"short_side": (80, 96)}).at_size(None)))


def test_the_runner_pastes_masks_as_pytorch_does():
    draw = torch.Generator().manual_seed(0)
    grids = torch.rand(60, 7, 9, generator=draw)
    corners = torch.rand(60, 2, 2, generator=draw) * 90 - 20  # some outside the image of 40 x 50 px
    windows = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    windows[:3] = torch.tensor([[10.2, 10.3, 10.25, 30.0], [-9, -9, -3, -3], [0, 0, 50, 40]])
    expected = Masks.in_boxes(grids, windows).paste((40, 50)).numpy()
    found = onnx_runner.paste(grids.numpy(), windows.numpy().astype(float), (40, 50))
    assert expected.any(axis=(1, 2)).sum() > 30
    assert (found != expected).sum() <= 2  # soft values that differ from one half in the last bit
    assert onnx_runner.paste(grids.numpy()[:0], windows.numpy()[:0], (40, 50)).shape == (0, 40, 50)


@pytest.mark.parametrize(
    "mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool), np.tri(4, 6) > 0]
)
def test_run_lengths_are_those_of_coco(mask):
    coded = onnx_runner.run_lengths(mask)
    rle = to_rles([coded], *mask.shape)[0]
    assert (mask_utils.decode(rle) == mask).all()
    truth = {"images": [{"id": 1, "height": mask.shape[0], "width": mask.shape[1]}], "categories": [{"id": 1}]}
    entry = {"image_id": 1, "category_id": 1, "score": 1.0, "segmentation": coded}
    score(truth | {"annotations": []}, [entry])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16", "turned", "transparent"])
def test_the_runner_reads_images_as_the_package_does(tmp_path, mode):
    values = np.random.default_rng(1).integers(0, 256, (5, 8, 4), dtype=np.uint8)
    plain = Image.fromarray(values[:, :, :3])
    path, extra = tmp_path / "picture.png", {}
    if mode == "turned":
        path, extra = tmp_path / "picture.jpg", {"exif": Image.Exif()}
        extra["exif"][0x0112] = 6
    picture = {
        "RGB": plain,
        "L": plain.convert("L"),
        "P": plain.quantize(16),
        "RGBA": Image.fromarray(values),
        "I;16": Image.fromarray(values[:, :, 0].astype(np.uint16) * 250),
        "turned": plain,
        "transparent": plain.quantize(16),
    }[mode]
    if mode == "transparent":
        extra = {"transparency": 3}
    picture.save(path, **extra)
    assert (onnx_runner.read_image(path) == images.decode(path.read_bytes(), str(path))).all()


def test_parity_handles_nan_and_missing_values():
    close = export.Parity(raw_images=1, raw={"a": 1e-4}, images=1, pytorch={"segm_AP": 0.2}, onnx={"segm_AP": 0.2009})
    assert close.holds
    none = {"segm_AP": None}
    assert dataclasses.replace(close, pytorch=none, onnx=none).holds
    for change in ({"raw": {"a": 2e-3}}, {"raw": {"a": float("nan")}}, {"onnx": {"segm_AP": 0.2011}}, {"onnx": none}):
        assert not dataclasses.replace(close, **change).holds


@pytest.fixture(scope="module")
def fresh_run(tmp_path_factory, tiny_coco):
    return make_run(tmp_path_factory.mktemp("fresh") / "run", tiny_coco, "mask_rcnn", steps=0)


def test_safetensors_do_not_need_onnx_and_onnx_names_its_requirements(fresh_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    out = tmp_path / "out"
    refused = CliRunner().invoke(main, ["export", str(fresh_run), "--out", str(out)])
    assert refused.exit_code == 2
    assert "pip install pais-ray[export]" in refused.stderr
    assert not out.exists()
    words = ["export", str(fresh_run), "--out", str(out), "--format", "safetensors", "--role", "student"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} == {"config.yaml", "manifest.json", "student.safetensors"}
    assert len(export.open_exported(out).categories) == 6
    with pytest.raises(ValueError, match="expected the manifest of an ONNX export"):
        onnx_runner.Detector(out)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    done = CliRunner().invoke(main, ["export", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_overwritten(fresh_run):
    folder = checkpoint_folder(fresh_run, 0)
    done = CliRunner().invoke(main, ["export", str(fresh_run), "--out", str(folder), "--format", "safetensors"])
    assert done.exit_code == 2
    verify(folder)


@pytest.mark.slow
@pytest.mark.parametrize("segmentor", ["mask_rcnn", "knet"])
def test_untrained_weights_agree_too(tmp_path, tiny_coco, segmentor):
    """All scores are similar and masks are random, so that many values are close to a threshold."""
    run = make_run(tmp_path / "run", tiny_coco, segmentor, steps=0)
    assert export.export(run, tmp_path / "out")["parity"]["holds"]
