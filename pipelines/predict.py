"""Batch prediction as a program for a cluster: all images of a folder, bucket prefix or COCO JSON, in parts.

    pais-ray submit predict /shared/runs/first s3://bucket/images --out /shared/labels --use-gpu \\
        --address http://HEAD:8265

The words are those of `pais-ray batch-predict`; the same command resumes after an interruption.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["batch-predict", *sys.argv[1:]])
