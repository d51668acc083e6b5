"""Audit the pseudo-labels of a run on a cluster, on images whose annotations were not used in training.

    pais-ray submit audit /shared/runs/first --number 1000 --num-gpus 1 --address http://HEAD:8265

The arguments are those of `pais-ray audit`.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])
