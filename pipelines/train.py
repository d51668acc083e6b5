"""Training as a job on a cluster: trains or resumes a run, evaluates it and prints where the result is.

    pais-ray submit train coco mask_rcnn pais data.labeled=0.01 run.name=first run.storage_path=/shared/runs \\
        --address http://HEAD:8265

The words are those of `pais-ray train`; the same command resumes.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
