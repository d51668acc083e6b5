"""Fixtures: annotated images, generated data, an S3-compatible server and one Ray cluster for the whole session."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine must not fail a test
settings.load_profile("patient")

# Bit-identical results are guaranteed for one thread per worker: with more, the last bit of oneDNN's gradients varies.
torch.set_num_threads(1)

IMAGE_SETS = Path(__file__).resolve().parent / "fixtures" / "images"
SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def image_sets() -> Path:
    """Small real annotated images that are part of the repository: one folder per data set."""
    if not IMAGE_SETS.is_dir():
        pytest.fail(f"{IMAGE_SETS}: expected the committed test images, got no folder; restore the checkout")
    return IMAGE_SETS


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Larger real annotated images beside the checkout, for checks in addition to those with ``image_sets``."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} with larger data sets does not exist; the tests with tests/fixtures/images run")
    return SHARED.resolve()


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory) -> Path:
    """A generated data set that is small enough to train on in a test: 12 + 4 images of 96 px."""
    from pais_ray.data.synthetic import generator

    folder = tmp_path_factory.mktemp("data") / "tiny"
    generator.generate(str(folder), train=12, val=4, size=96, seed=3)
    return folder


@pytest.fixture(scope="session")
def s3():
    """The (host, port) of an S3-compatible server on loopback; environment variables point to it."""
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
    """One local Ray cluster with two CPUs for all tests that need one. Its workers inherit the environment of this
    process, as in a user's local cluster."""
    import ray

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    os.environ["RAY_num_workers_soft_limit"] = "4"  # noqa: SIM112
    context = ray.init(address="local", num_cpus=2, log_to_driver=False)
    yield context.address_info
    ray.shutdown()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the two images of ``malformed.tree``."""
    from PIL import Image

    from tests.support.malformed import H, W

    for i in range(2):
        Image.new("RGB", (W, H), (40 * i, 90, 200)).save(tmp_path / f"{i}.png")
    return tmp_path
