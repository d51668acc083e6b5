"""Training as a program for `ray job submit`: train (or resume), evaluate, say where the result is.

    ray job submit --working-dir . -- python pipelines/train.py coco mask_rcnn pais data.labeled=0.01 run.name=first

The words are those of `pais-ray train`; RAY_ADDRESS is set by the job, so it runs on the cluster it was sent to.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
