"""Search on a cluster, train the best settings at full length, and register the teacher.

    pais-ray submit search coco mask_rcnn pais search_pais --name taus --model nuts run.storage_path=/shared/runs \
        --address http://HEAD:8265

The arguments are those of `pais-ray tune`, and `--model` names the registered model. The same command resumes.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
