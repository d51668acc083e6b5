"""The description of a run: its data by hash, its tags, and the commit of its own code."""

import re
import shutil
import subprocess
from pathlib import Path

from pais_ray.config.tree import compose
from pais_ray.runs import describe
from pais_ray.runs.prepare import find_trained_validation_images, prepare


def words(data: Path, *more: str) -> list[str]:
    paths = (f"data.train={data}/train.json", f"data.val={data}/val.json", f"data.images={data}/images")
    return ["synthetic", "mask_rcnn", "pais", *paths, "data.labeled=0.25", *more]


def test_data_are_identified_by_hash_and_counted(tiny_coco):
    config, data = prepare(compose(words(tiny_coco)))
    training, validation = data.facts["training"], data.facts["validation"]
    assert data.facts.keys() == {"training", "validation"}
    assert (training["images"], training["labeled"], training["unlabeled"]) == (12, 3, 9)
    assert (validation["name"], validation["images"]) == ("val", 4)
    assert training["source"] == f"{tiny_coco}/train.json"
    assert training["sha256"] == data.train.sha256 != validation["sha256"]
    tags = describe.tags(config, data.manifest.split, data.facts)
    assert tags["labels_pct"] == "25"
    assert tags["val_sha256"] == validation["sha256"]


def test_separate_unlabeled_images_are_listed_as_a_data_set(tiny_coco):
    _, data = prepare(compose(words(tiny_coco, f"data.unlabeled={tiny_coco}/images")))
    assert data.facts["unlabeled"]["images"] == len(data.unlabeled) > 0
    assert "unlabeled" not in data.facts["training"]


def test_validation_images_that_are_also_training_images_are_found(tiny_coco, tmp_path):
    (tmp_path / "link").symlink_to(tiny_coco)  # the same files by another path
    both = ("data.images=null", f"data.val={tmp_path}/link/train.json", f"data.val_images={tmp_path}/link/images")
    named = (f"data.train_images={tiny_coco}/images",)
    found = find_trained_validation_images(prepare(compose(words(tiny_coco, *both, *named)))[1])
    assert len(found) == 12
    assert found[0].startswith(f"{tmp_path}/link/")
    assert find_trained_validation_images(prepare(compose(words(tiny_coco)))[1]) == []


def test_a_different_holdout_is_a_different_validation_set(tiny_coco):
    def held_out(share: float) -> str:
        paths = (f"data.train={tiny_coco}/train.json", f"data.images={tiny_coco}/images", f"data.holdout={share}")
        words = ["synthetic", "mask_rcnn", "pais", *paths, "data.labeled=0.5"]
        return prepare(compose(words))[1].facts["validation"]["sha256"]

    assert held_out(0.25) == held_out(0.25) != held_out(0.5)


def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    commit = describe.git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
    package = tmp_path / "package"
    (package / "train").mkdir(parents=True)
    shutil.copy(describe.__file__, package / "train")
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(describe, "__file__", str(package / "train" / "describe.py"))
    assert describe.git_commit() is None, "not a checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project's"], check=True)
    assert describe.git_commit() is None, "installed inside the checkout of another project"
    subprocess.run([*git, "add", "package/__init__.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert describe.git_commit() == head
    (package / "__init__.py").write_text("changed = True")
    assert describe.git_commit() == f"{head}-dirty"
