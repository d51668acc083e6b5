"""Jobs on a cluster of three nodes: `pais-ray submit`, exit codes, stops, the loss and the draining of a node."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import pytest
from pyarrow import fs

from pais_ray.files.json_lines import metric_rows
from pais_ray.runs.directory import completed_steps
from tests.faults.harness import assert_same_end, events, steps_logged
from tests.ray.test_main_job import words
from tests.support.nodes import RAY, Nodes, command_line, nodes, processes
from tests.support.servers import free_port
from tests.support.untrained import untrained_run
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]
SUBMIT = [sys.executable, "-m", "pais_ray.cli", "submit"]
STEPS = 8


KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}  # moto accepts any keys


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A head and two nodes of two CPUs each that require a token."""
    with nodes(tmp_path_factory.mktemp("n"), [2, 2, 2], **KEYS) as started:
        yield started


class Submitted:
    """`pais-ray submit` in a process, with its output in a file."""

    def __init__(self, cluster: Nodes, *arguments: str) -> None:
        self.log = cluster.folder / f"submit{len(list(cluster.folder.glob('submit*')))}.log"
        env = {**cluster.env, "PYTHONPATH": os.getcwd()}
        default_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell ignores SIGINT
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*SUBMIT, *arguments, "--address", cluster.address],
                env=env, cwd=cluster.folder, preexec_fn=default_sigint, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def is_running(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return True

    def ends(self, code: int) -> str:
        assert self.process.wait() == code, self.log.read_text()
        return self.log.read_text()


def workers_on(cluster: Nodes, index: int) -> int:
    return sum("RayTrainWorker" in " ".join(command_line(p)) for p in processes(cluster.running[index]))


def ray_job(cluster: Nodes, *words: str) -> str:
    command = [*RAY, "job", *words, "--address", cluster.address]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, check=True).stdout


def test_a_failing_job_reports_its_status_and_cause(three):
    output = Submitted(three, "tables", "/nowhere").ends(2)
    assert "Directory '/nowhere' does not exist" in output
    assert "failed: Job entrypoint command failed with exit code 2" in output
    token = Path(three.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert token not in output
    assert token not in ray_job(three, "list")


def test_a_cluster_refuses_clients_without_its_token(three):
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*SUBMIT, "tables", "/runs", "--address", three.address]
    done = subprocess.run(command, env={**env, "HOME": str(three.folder)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Unauthorized" in done.stderr
    assert f"into {three.folder}/.ray/auth_token with mode 600" in done.stderr


@pytest.fixture
def bucket(tiny_coco):
    """A bucket with the images of tiny_coco on a server with S3's interface; its URI."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        where = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
        store = fs.S3FileSystem(
            access_key="test", secret_key="test", allow_bucket_creation=True, request_timeout=60, **where
        )
        wait_for(partial(answers, port), lambda: server.poll() is None)
        store.create_dir("photos")
        for path in (tiny_coco / "images").iterdir():
            with store.open_output_stream(f"photos/images/{path.name}") as file:
                file.write(path.read_bytes())
        yield "s3://photos/images?" + urlencode(where)
    finally:
        server.kill()
        server.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.mark.slow
def test_a_job_predicts_the_images_of_a_bucket(three, bucket, tiny_coco, tmp_path):
    run = untrained_run(tiny_coco, tmp_path)
    words = ["predict", str(run), bucket, "--out", str(tmp_path / "out"), "--part-images", "6", "--merge"]
    assert "16/16 images" in Submitted(three, *words).ends(0)
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == sorted(p.name for p in (tiny_coco / "images").iterdir())
    assert len({r["image_id"] for r in json.loads((tmp_path / "out" / "results.json").read_text())}) == 16
    assert "3 of them finished" in Submitted(three, *words).ends(0)


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_stopping_it_leaves_a_checkpoint(three, tiny_coco, tmp_path):
    root = tmp_path / "left"
    long = ("train.steps=5000", "train.eval_every=null", "train.checkpoint_every=5000", "train.panel_every=null")
    running = Submitted(three, "train", *words(tiny_coco, tmp_path, "left", *long))
    wait_for(lambda: 3 in steps_logged(root), running.is_running)
    running.process.send_signal(signal.SIGINT)
    output = running.ends(1)
    assert "the log is no longer shown; the job keeps running" in output
    job = re.search(r"stop it: .* (\S+)$", output, re.MULTILINE).group(1)
    left_at = max(steps_logged(root))
    wait_for(lambda: max(steps_logged(root)) > left_at)
    ray_job(three, "stop", job)
    assert "stopped with a checkpoint" in ray_job(three, "logs", job)
    assert completed_steps(root) > left_at


@pytest.mark.slow
def test_a_job_that_loses_a_node_ends_with_the_same_result(three, tiny_coco, tmp_path):
    def job(name: str) -> Submitted:
        more = ("scaling.placement_strategy=SPREAD", "train.panel_every=1")
        return Submitted(three, "train", *words(tiny_coco, tmp_path, name, *more))

    started = time.monotonic()
    root = tmp_path / "node_killed"
    running = job("node_killed")
    wait_for(lambda: 3 in steps_logged(root), running.is_running)
    first = time.monotonic() - started
    counts = {index: workers_on(three, index) for index in range(3)}
    assert sorted(counts.values()) == [0, 1, 1], counts
    victim = max(index for index in counts if counts[index])  # never 0, the head with the driver
    assert victim
    at, killed = max(steps_logged(root)), time.monotonic()
    three.kill(victim)
    wait_for(lambda: max(steps_logged(root), default=0) > at, running.is_running)
    again = time.monotonic() - killed
    output = running.ends(0)
    print(f"submit to step 3: {first:.1f} s; kill to the next new step: {again:.1f} s")
    assert "resumed at step" in output
    assert re.search(r"^teacher +\d", output, re.MULTILINE), "the AP table"
    assert steps_logged(root) == list(range(1, STEPS + 1))
    rows = metric_rows(root)
    for role in ("teacher", "student"):
        assert [r["step"] for r in rows if f"{role}/segm_AP" in r] == [4, STEPS]
    job("undisturbed").ends(0)  # on the remaining nodes
    assert_same_end(root, tmp_path / "undisturbed", STEPS)


@pytest.mark.slow
def test_a_drained_node_does_not_count_as_a_failure(three, tiny_coco, tmp_path):
    """With infra/drain_on_notice.sh: Ray Train leaves the node, and does not count this as a failure."""
    if any(node.poll() is not None for node in three.running):  # killed by another test
        three.join(cpus=2)
    root = tmp_path / "drained"
    more = ("scaling.placement_strategy=SPREAD", "train.panel_every=1", "train.steps=60", "run.max_failures=0")
    more += (
        "train.eval_every=60",
        "train.checkpoint_every=60",
    )  # the only checkpoint is the one that the notice requests
    running = Submitted(three, "train", *words(tiny_coco, tmp_path, "drained", *more))
    wait_for(lambda: 3 in steps_logged(root), running.is_running)
    counts = {index: workers_on(three, index) for index in range(len(three.running))}
    victim = max(index for index in counts if counts[index])
    assert victim
    command = [
        "bash",
        "infra/drain_on_notice.sh",
        three.gcs,
        "30",
    ]  # s, for two steps and a checkpoint on a busy machine
    env = {**three.env, "NOTICE": "true", "NODE_ID": three.node_id(victim)}
    subprocess.run(command, env=env, check=True)
    wait_for(lambda: not workers_on(three, victim), running.is_running)
    three.kill(victim)
    output = running.ends(0)
    assert "resumed at step" in output
    assert len(events(root, "node_leaving")) == 1
    assert 3 <= events(root, "start")[1]["step"] < 60, "the checkpoint that the notice requested"
    assert steps_logged(root) == list(range(1, 61))
