"""Train on a cluster: train or resume a run, evaluate it, and print its run directory.

    pais-ray submit train coco mask_rcnn pais data.labeled=0.01 run.name=first run.storage_path=/shared/runs \\
        --address http://HEAD:8265

The arguments are those of `pais-ray train`. The same command resumes.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
