"""The quickstart, which `make demo` runs, learns. It takes minutes, so it is in `make test-all` only."""

import pytest

from pais_ray.config.tree import compose
from pais_ray.train.driver import launch

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_teacher_of_the_quickstart_reaches_its_ap(cluster, tmp_path):
    result = launch.train(compose(["quickstart", "run.name=demo", f"run.storage_path={tmp_path}"]))
    assert result.step == result.steps
    assert result.scores["teacher/segm_AP50"] >= 0.20
