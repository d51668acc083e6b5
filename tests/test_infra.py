"""The files of infra/ are valid for Docker, Compose, Kubernetes and Ray. No test starts anything.

There is no package with KubeRay's schema, so three other checks cover the RayJob: the schema of Kubernetes for each of
its pods, Ray's autoscaler, which parses such a resource, and the models below.
"""

import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

INFRA = Path(__file__).resolve().parents[1] / "infra"
KUBERNETES = "1.35"  # the version whose schema the manifests are validated against
REGISTRY_HOST = re.compile(r"image: *[\w.-]+\.[a-z]+(:\d+)?/|FROM +[\w.-]+\.[a-z]+(:\d+)?/|index-url +http")


def require_module(module: str) -> None:
    """Skips the test if a validator is not installed; in CI that is a failure."""
    if importlib.util.find_spec(module) is None:
        (pytest.fail if os.environ.get("PAIS_RAY_CI") else pytest.skip)(f"{module} is not installed")


def tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        (pytest.fail if os.environ.get("PAIS_RAY_CI") else pytest.skip)(f"{name} is not installed")
    return str(found)


def documents() -> list[dict]:
    return list(yaml.safe_load_all((INFRA / "rayjob.yaml").read_text()))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Group(Strict):
    """The fields in use of HeadGroupSpec and WorkerGroupSpec (ray.io/v1)."""

    rayStartParams: dict[str, str]
    template: dict
    groupName: str | None = None
    replicas: int | None = None
    minReplicas: int | None = None
    maxReplicas: int | None = None


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: dict[str, str]
    enableInTreeAutoscaling: bool
    autoscalerOptions: dict
    headGroupSpec: Group
    workerGroupSpecs: list[Group]


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    backoffLimit: int
    rayClusterSpec: ClusterSpec


def pods(job: dict) -> dict[str, dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{g["groupName"]: g for g in cluster["workerGroupSpecs"]}}
    return {name: group["template"] for name, group in groups.items()}


def test_the_claim_and_every_pod_are_valid_for_kubernetes():
    require_module("kubernetes_validate")
    import kubernetes_validate

    claim, job = documents()
    made = [claim]
    for name, template in pods(job).items():
        made.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template})
    assert len(made) == 3
    for manifest in made:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    made[1]["spec"]["containers"][0]["imagee"] = "typo"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made[1], KUBERNETES, strict=True)


def test_the_rayjob_has_the_fields_of_kuberay_and_its_claim():
    claim, job = documents()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = RayJobSpec.model_validate(job["spec"])
    assert spec.submissionMode in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert spec.rayClusterSpec.authOptions == {"mode": "token"}
    for name, template in pods(job).items():
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        mounts = {m["name"]: m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shared"] == "/shared"


def test_the_cluster_of_the_rayjob_is_valid_for_rays_autoscaler():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    _, job = documents()
    cluster = {"metadata": {"name": "pais-ray", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["gpu"]["resources"]["GPU"] == 1
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"]) == (0, 8)
    assert types["headgroup"]["resources"].get("GPU", 0) == 0


def test_the_arguments_of_the_rayjob_are_a_valid_config():
    from pais_ray.config.tree import compose
    from pais_ray.runs.prepare import check_outlives_job

    words = documents()[1]["spec"]["entrypoint"].split()
    assert words[:2] == ["pais-ray", "train"]
    config = compose(words[2:])
    check_outlives_job(config)
    assert config.run.name is not None, "the next attempt resumes the run of this name"


def test_the_cluster_of_virtual_machines_is_valid_for_ray(tmp_path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(json.loads(json.dumps(config))))
    gpu = config["available_node_types"]["gpu"]
    assert gpu["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert gpu["min_workers"] < gpu["max_workers"]
    config["available_node_types"]["gpu"]["max_worker"] = 8
    with pytest.raises(Exception, match="max_worker"):
        validate_config(config)


@pytest.mark.parametrize("name", ["Dockerfile", "mlflow/Dockerfile"])
def test_hadolint_reports_nothing(name):
    done = subprocess.run([tool("hadolint"), str(INFRA / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (INFRA / name).read_text()
    assert re.search(r"^USER 1000", text, re.MULTILINE)
    assert ":latest" not in text


def test_the_compose_file_of_the_mlflow_server_is_valid():
    path = INFRA / "mlflow" / "compose.yaml"
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    services = yaml.safe_load(path.read_text())["services"]
    assert [p for s in services.values() for p in s.get("ports", [])] == ["127.0.0.1:5000:5000"]
    assert all(":" in s["image"] for s in services.values() if "image" in s), "versions"


def test_secrets_are_created_once_and_readable_by_their_owner_only(tmp_path):
    folder = tmp_path / "secrets"
    command = [sys.executable, str(INFRA / "mlflow" / "make_secrets.py"), str(folder)]
    assert subprocess.run(command, check=False).returncode == 0
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    compose = (INFRA / "mlflow" / "compose.yaml").read_text()
    assert {f"secrets/{name}" in compose for name in made} == {True}
    assert subprocess.run(command, check=False).returncode == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    password = made["database.env"].strip().partition("=")[2]
    assert password in made["mlflow.env"]
    assert password in made["basic_auth.ini"]


def test_no_file_contains_a_registry_host_or_a_secret():
    for path in INFRA.rglob("*"):
        if path.is_file() and "secrets/" not in str(path) and path.suffix != ".pyc":
            text = path.read_text()
            assert not REGISTRY_HOST.search(text), path
            assert not re.search(r"(PASSWORD|SECRET_KEY|ACCESS_KEY)(_ID)?[=:] *[\w-]{6,}", text), path
