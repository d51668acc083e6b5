"""The typed settings of a run, and their composition from files in configs/ and overrides."""
