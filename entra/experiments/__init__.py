"""Experiments that train models: what `make evidence` and `make evidence-full` run."""
