"""Commands and configuration. The only place that imports hydra."""
