"""The whole search as a program for a cluster: search, retrain the best at full length, register it.

    pais-ray submit search coco mask_rcnn pais search_pais --over method.tau_cls=0.35,0.5,0.65 run.name=taus \
        run.storage_path=/shared/runs --address http://HEAD:8265

The words are those of `pais-ray tune`.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:], "--retrain-best"])
