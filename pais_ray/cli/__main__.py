"""The command `python -m pais_ray.cli`, the same as `pais-ray`."""

from pais_ray.cli import main

if __name__ == "__main__":
    main()
