"""The import rules of docs/architecture.md, and the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pais_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

HOMES = {  # third-party package -> the files (relative to pais_ray/) that may import it; a folder ends in /
    "ray": {
        "data/pipeline.py",
        "train/worker.py",
        "train/launch.py",
        "train/cluster.py",
        "train/watch.py",
        "train/monitor.py",
        "train/heartbeat.py",
        "train/watchdog.py",
        "batch_predict.py",
        "submit.py",
        "search/run.py",
    },
    # A run's image, its checkpoints and its node's samples in MLflow; versions; the file that MLflow runs to serve one.
    "mlflow": {"mirror.py", "ranking.py", "system_metrics.py", "registry.py", "served.py"},
    "albumentations": {"data/"},
    "kornia": {"data/"},
    "cv2": {"data/"},
    "pycocotools": {"data/", "evaluate.py", "evaluate_cityscapes.py"},
    "matplotlib": {"plots.py", "plots_audit.py"},
    "onnx": {"export.py"},
    "onnxscript": {"export.py"},
    "onnxruntime": {"export.py", "onnx_runner.py"},
    "optuna": {"search/propose.py"},
}
LAYERS = {  # lower may not import higher
    0: {"structures", "geometry", "losses", "matching", "backbones", "optim"},
    1: {"segmentors", "methods"},
    2: {
        *("data", "guards", "evaluate", "evaluate_cityscapes", "analysis", "plots", "plots_audit"),
        *("tracking", "mirror", "ranking", "tail", "system_metrics", "onnx_runner", "access"),
    },
    3: {"config", "overlays", "plugins"},
    4: {
        *("train", "inference", "export", "batch_predict", "audit", "tables", "submit"),
        *("gallery", "compare", "registry", "served"),
    },
    5: {"search"},
    6: {"cli", "__init__"},
}
THIRD_PARTY_OF_LAYER_0 = {"torch", "torchvision", "pydantic", "scipy", "safetensors"}
TORCH_FREE = {  # imported by Ray's data tasks
    "data/pipeline.py",
    "data/plan.py",
    "data/storage.py",
    "data/encoded.py",
    "data/shards.py",
    "data/shard_writer.py",
    "data/images.py",
    "data/sources.py",
    "data/validate.py",
    "data/entries.py",
    "data/report.py",
    "data/repair.py",
    "data/splits.py",
    "data/split_lists.py",
    "data/cityscapes.py",
    "data/formats.py",
    "data/detect.py",
    "data/scored.py",
    "data/synthetic.py",
    "onnx_runner.py",  # runs where there is no torch
    "evaluate.py",
    "evaluate_cityscapes.py",
    "overlays.py",
    "plugins.py",
    "train/monitor.py",
    "train/start.py",
    "access.py",
    "submit.py",
}


def imports(path: Path, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
            found += names if node.module in ("pais_ray", "pais_ray.data", "pais_ray.train") else [node.module or ""]
    return found


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(unit: str) -> int:
    return next(level for level, units in LAYERS.items() if unit in units)


def family(module: str) -> str:
    """The public plugin that a module, or a private part of it, belongs to."""
    name = module.split(".")[-1].lstrip("_")
    public = [p.stem for folder in ("segmentors", "methods") for p in (PACKAGE / folder).glob("[!_]*.py")]
    return max((p for p in public if name.startswith(p)), key=len, default=name)


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    unit = relative(path).split("/")[0].removesuffix(".py")
    here = layer_of(unit)
    for module in imports(path):
        root = module.split(".")[0]
        if root in HOMES:
            allowed = any(
                relative(path) == home or (home[-1] == "/" and relative(path).startswith(home)) for home in HOMES[root]
            )
            assert allowed, f"{relative(path)} imports {module}; its home is {sorted(HOMES[root])}"
        if root == "pais_ray":
            other = unit_of(module)
            assert layer_of(other) <= here, (
                f"{relative(path)} (layer {here}) imports {module} (layer {layer_of(other)})"
            )
            if here == 1 and layer_of(other) == 1:
                assert other == unit, f"{relative(path)} imports {module} of the same layer"
                assert family(path.stem) == family(module), f"{relative(path)} imports its sibling {module}"
        elif here == 0:
            known = root in sys.stdlib_module_names or root in THIRD_PARTY_OF_LAYER_0
            assert known, f"{relative(path)} imports {module}"


@pytest.mark.parametrize("path", [PACKAGE / name for name in sorted(TORCH_FREE)], ids=relative)
def test_what_data_tasks_import_does_not_import_torch(path):
    module = "pais_ray." + relative(path).removesuffix(".py").replace("/", ".")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_unit_has_a_layer():
    units = {relative(p).split("/")[0].removesuffix(".py") for p in FILES}
    assert units == set().union(*LAYERS.values())


def test_methods_and_segmentors_know_neither_config_nor_ray():
    for folder in ("methods", "segmentors"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert not {"ray", "pais_ray.config", "config"} & {m.split(".")[-1] for m in imports(path)}


def test_public_names_resolve_and_are_lazy():
    import pais_ray

    for name in ("PAIS", "Supervised", "MaskRCNN", "KNet", "Targets", "Predictions", "Masks"):
        assert getattr(pais_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Knet'"):
        _ = pais_ray.Knet
    code = "import sys, pais_ray, pais_ray.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pickle_and_no_unsafe_yaml():
    programs = [p for folder in ("pipelines", "infra", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert programs
    for path in [*FILES, *programs]:
        text = path.read_text()
        for word in ("import pickle", "pickle.load", "yaml.load(", "weights_only=False", "shell=True"):
            assert word not in text, f"{path}: {word}"


def test_the_drawing_and_the_house_agree():
    drawing = (ROOT / "docs" / "architecture.md").read_text()
    for path in FILES:
        if path.name != "__init__.py" and not path.name.startswith("_"):
            assert path.name in drawing, f"docs/architecture.md does not show {relative(path)}"
