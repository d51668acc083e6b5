"""Tabulate many runs on the cluster that stores their run directories.

    pais-ray submit tables /shared/runs --markdown /shared/table.md --csv /shared/table.csv --address http://HEAD:8265

The arguments are those of `pais-ray tables`.
"""

import sys

from pais_ray.cli import main

if __name__ == "__main__":
    main(["tables", *sys.argv[1:]])
