"""The pseudo-label audit as a job on a cluster: a run's teacher on images whose annotations were not used.

    pais-ray submit audit /shared/runs/first --number 1000 --num-gpus 1 --address http://HEAD:8265

The words are those of `pais-ray audit`.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])
