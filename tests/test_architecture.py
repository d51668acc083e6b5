"""The import rules of docs/architecture.md, and the public names."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pais_ray"

FLOORS = {  # folder -> floor; a folder may import folders of lower floors only
    "structures": 0,
    "files": 0,
    "modeling": 1,
    "augmentation": 1,
    "tracking": 1,
    "cluster": 1,
    "figures": 1,
    "data": 2,
    "config": 3,
    "evaluation": 3,
    "runs": 4,
    "inference": 5,
    "reports": 6,
    "train": 7,
    "search": 8,
    "cli": 9,
}
HOMES = {  # third-party package -> the modules, or packages, that may import it
    "ray": {
        "pais_ray.cluster",
        "pais_ray.data.stream.pipeline",
        "pais_ray.inference.batch",
        "pais_ray.search.tuner",
        "pais_ray.train.driver",
        "pais_ray.train.worker",
        "pais_ray.train.job",
    },
    "mlflow": {
        "pais_ray.tracking.mirror",
        "pais_ray.tracking.logged_models",
        "pais_ray.tracking.mlflow_compat",
        "pais_ray.inference.serving",
    },
    "albumentations": {"pais_ray.augmentation"},
    "kornia": {"pais_ray.augmentation"},
    "cv2": {"pais_ray.augmentation", "pais_ray.data"},
    "pycocotools": {"pais_ray.data", "pais_ray.evaluation"},
    "matplotlib": {"pais_ray.figures"},
    "onnx": {"pais_ray.inference.export.export"},
    "onnxscript": {"pais_ray.inference.export.export"},
    "onnxruntime": {"pais_ray.inference.export"},
    "optuna": {"pais_ray.search.samplers"},
    "timm": {"pais_ray.modeling"},
}
TORCH_FREE = [  # imported by Ray's data tasks, by scoring tasks, by the runner of an exported model, or at every start
    "pais_ray.data.stream.pipeline",
    "pais_ray.data.stream.plan",
    "pais_ray.data.stream.rows",
    "pais_ray.data.images.reader",
    "pais_ray.data.images.images",
    "pais_ray.data.shards.dataset",
    "pais_ray.data.shards.writer",
    "pais_ray.data.annotations.coco",
    "pais_ray.data.annotations.cityscapes",
    "pais_ray.data.annotations.ground_truth",
    "pais_ray.data.annotations.splits",
    "pais_ray.data.sources.discover",
    "pais_ray.data.sources.readers",
    "pais_ray.data.sources.scored_masks",
    "pais_ray.data.sources.published_splits",
    "pais_ray.data.synthetic.generator",
    "pais_ray.data.validation.report",
    "pais_ray.data.validation.repair",
    "pais_ray.evaluation.results",
    "pais_ray.evaluation.scoring",
    "pais_ray.evaluation.evaluators.coco",
    "pais_ray.evaluation.evaluators.cityscapes",
    "pais_ray.files.storage",
    "pais_ray.inference.export.onnx_runner",
    "pais_ray.config.overlays",
    "pais_ray.modeling.registry",
    "pais_ray.train.messages",
    "pais_ray.train.driver.monitor",
    "pais_ray.train.worker.entrypoint",
    "pais_ray.cluster.token",
    "pais_ray.cluster.jobs",
]


def module_name(path: Path, root: Path) -> str:
    return ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The full names of all modules that a file imports, inside functions too, without those for the type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else str(node.module)


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules that it imports, third-party ones too."""
    files = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    return {name: set(imported(path, files)) for name, path in files.items()}


def folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def wrong_imports(edges: Mapping[str, set[str]], floors: Mapping[str, int]) -> list[str]:
    """Imports that go up, or sideways to another folder of the same floor."""
    package = next(iter(edges)).split(".")[0]
    return [
        f"{module} (floor {floors[folder(module)]}) imports {other} (floor {floors[folder(other)]})"
        for module, others in edges.items()
        for other in sorted(others)
        if module != package and other.split(".")[0] == package and folder(other) != folder(module)
        if other == package or floors[folder(other)] >= floors[folder(module)]
    ]


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """The modules of one import circle, or nothing."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for other in sorted(edges.get(module, ())):
            if found := search(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in edges if (found := search(module, []))), [])


EDGES = graph(PACKAGE)


def test_every_folder_has_a_floor_and_no_module_is_outside_a_folder():
    assert {folder(module) for module in EDGES} - {""} == set(FLOORS)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_imports_go_down():
    assert wrong_imports(EDGES, FLOORS) == []


def test_no_imports_in_a_circle():
    assert circle(EDGES) == []


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("structures.masks", "modeling.losses"),  # upward
        ("modeling.losses", "tracking.record"),  # sideways
        ("data.reading", "data.images.reader"),  # in a circle inside a folder
    ],
)
def test_the_rules_see_an_import_that_breaks_them(importer, target):
    edges = {**EDGES, f"pais_ray.{importer}": EDGES[f"pais_ray.{importer}"] | {f"pais_ray.{target}"}}
    assert wrong_imports(edges, FLOORS) or circle(edges)


def test_third_party_packages_stay_at_home():
    for module, others in EDGES.items():
        for other in others:
            homes = HOMES.get(other.split(".")[0])
            assert homes is None or any(f"{module}.".startswith(f"{home}.") for home in homes), (
                f"{module} imports {other}; it may be imported in {sorted(homes)}"
            )


FIRST_IMPORT_OF_TORCH = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    if "torch" in sys.modules:
        sys.exit(f"{module} imports torch")
"""


def test_modules_of_data_and_scoring_tasks_do_not_import_torch():
    """In one process, because starting one for each module takes most of the time."""
    command = [sys.executable, "-c", FIRST_IMPORT_OF_TORCH, *TORCH_FREE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_check_names_the_module_that_imports_torch():
    command = [sys.executable, "-c", FIRST_IMPORT_OF_TORCH, "pais_ray.files.atomic", "pais_ray.structures.geometry"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "pais_ray.structures.geometry imports torch"


def test_methods_and_segmentors_do_not_import_each_other():
    """Each public file and its private parts (``_name*.py``) form a unit."""
    for kind in ("methods", "segmentors"):
        prefix = f"pais_ray.modeling.{kind}."
        names = [module.removeprefix(prefix) for module in EDGES if module.startswith(prefix)]
        public = [name for name in names if not name.startswith("_")]

        def unit(name: str, public: list[str] = public) -> str:
            return next((p for p in public if name.lstrip("_").startswith(p)), name)

        for name in names:
            for other in EDGES[prefix + name]:
                if other.startswith(prefix):
                    assert unit(other.removeprefix(prefix)) == unit(name), f"{prefix}{name} imports {other}"


def test_public_names_resolve_and_are_lazy():
    package = importlib.import_module("pais_ray")
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Knet'"):
        _ = package.Knet
    code = "import sys, pais_ray, pais_ray.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_that_moved_name_their_new_place():
    package = importlib.import_module("pais_ray")
    for old, new in vars(package)["_MOVED"].items():
        assert importlib.util.find_spec(f"pais_ray.{new}") is not None, new
        assert importlib.util.find_spec(f"pais_ray.{old}") is None, old
        with pytest.raises(AttributeError, match=rf"'pais_ray\.{old}' is now 'pais_ray\.{new}'"):
            getattr(package, old)


def test_no_pickle_and_no_unsafe_yaml():
    programs = [p for place in ("pais_ray", "pipelines", "infra", "benchmarks") for p in (ROOT / place).rglob("*.py")]
    for path in programs:
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "pickle.load", "yaml.load(", "weights_only=False", "shell=True"):
            assert word not in text, f"{path}: {word}"


def test_the_documentation_shows_every_folder():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in FLOORS:
        assert f"`{name}/`" in page, f"docs/architecture.md does not show {name}/"
