"""What `make demo` promises: the quickstart learns. Minutes long, so only in `make test-all`."""

import pytest

from pais_ray.config.tree import compose
from pais_ray.train.driver import launch

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_quickstarts_teacher_reaches_its_ap(cluster, tmp_path):
    result = launch.train(compose(["quickstart", "run.name=demo", f"run.storage_path={tmp_path}"]))
    assert result.step == result.steps
    assert result.scores["teacher/segm_AP50"] >= 0.20
