"""The typed settings of a run, the configuration files, and the overrides on top of them."""
