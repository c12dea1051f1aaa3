"""Experiments: questions about the method, answered with numbers, and the evidence that training with it works."""

EXPERIMENTS: dict[str, str] = {
    "importance": "entra.experiments.importance",
    "threshold": "entra.experiments.threshold",
    "lambda": "entra.experiments.attention_weight",
    "proxy": "entra.experiments.proxy",
    "domain": "entra.experiments.domain",
    "overhead": "entra.experiments.overhead",
    "train-threshold": "entra.experiments.train_threshold",
    "train-lambda": "entra.experiments.train_lambda",
    "transfer": "entra.experiments.transfer",
}
"""The module of each `entra experiment NAME`, in the order of docs/experiments.md (see `entra.experiments.results`)."""
