"""Predict instances on a cluster, in all images of a folder, bucket prefix or COCO JSON.

    pais-ray submit predict /shared/runs/first s3://bucket/images --out /shared/labels --use-gpu \\
        --address http://HEAD:8265

The arguments are those of `pais-ray batch-predict`. The same command resumes after any interruption.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["batch-predict", *sys.argv[1:]])
