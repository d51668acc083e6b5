"""The whole search as a program for a cluster: search, train the best settings at full length, register the teacher.

    pais-ray submit search coco mask_rcnn pais search_pais --name taus --model nuts run.storage_path=/shared/runs \
        --address http://HEAD:8265

The words are those of `pais-ray tune`, and `--model` names the registered model; the same command goes on.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from pais_ray.cli import main


def verb(*words: str) -> None:
    """One verb of `pais-ray`; where it fails, the program ends with its exit code."""
    try:
        main(list(words))
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="name of the registered model")
    parser.add_argument("--json", type=Path, help="what the search came to, as `pais-ray tune` writes it")
    own, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = own.json or Path(folder) / "search.json"
        verb("tune", *words, "--retrain-best", "--json", str(found))
        best = json.loads(found.read_text()).get("retrained")
    if best is None or best["stopped"]:
        sys.exit("the search was stopped; the same command goes on")
    verb("register", best["run_dir"], "--name", own.model)
