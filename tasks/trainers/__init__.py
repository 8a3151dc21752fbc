"""Programs that run inside a training job: the only modules that import TRL."""
