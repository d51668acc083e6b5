"""Fixtures: generated data, the real images beside the project where they are, one Ray cluster for the whole run."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("patient")

# Bit for bit is promised for one thread a worker: with more, oneDNN's weight gradients vary in the last bit.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared/data (real annotated images) is not there")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory) -> Path:
    """A generated data set small enough to train on in a test: 12 + 4 images of 96 px."""
    from pais_ray.data.synthetic import generator

    folder = tmp_path_factory.mktemp("data") / "tiny"
    generator.generate(str(folder), train=12, val=4, size=96, seed=3)
    return folder


@pytest.fixture(scope="session")
def s3():
    """An S3-compatible server on loopback, as its (host, port), and the environment that says where it is."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield host, port
    server.stop()


@pytest.fixture
def bucket(s3, request) -> str:
    """The name of a new bucket."""
    import zlib

    import boto3

    name = f"test-{zlib.crc32(request.node.nodeid.encode())}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def cluster(s3):
    """One local Ray cluster of two CPUs for all tests that need one, stopped by its processes at the end. Its workers
    inherit the environment of this process, as a user's local cluster does."""
    import ray

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    os.environ["RAY_num_workers_soft_limit"] = "4"  # noqa: SIM112
    context = ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield context.address_info
    ray.shutdown()


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the two images of ``malformed.tree``."""
    from PIL import Image

    from tests.support.malformed import H, W

    for i in range(2):
        Image.new("RGB", (W, H), (40 * i, 90, 200)).save(tmp_path / f"{i}.png")
    return tmp_path
