"""Experiments: questions about the method, answered with numbers, and the evidence that training with it works."""

EXPERIMENTS: dict[str, str] = {
    "importance": "benchmarks.experiments.importance",
    "threshold": "benchmarks.experiments.threshold",
    "lambda": "benchmarks.experiments.attention_weight",
    "proxy": "benchmarks.experiments.proxy",
    "domain": "benchmarks.experiments.domain",
    "overhead": "benchmarks.experiments.overhead",
    "train-threshold": "benchmarks.experiments.train_threshold",
    "train-lambda": "benchmarks.experiments.train_lambda",
    "transfer": "benchmarks.experiments.transfer",
}
"""The module of each `entra experiment NAME`, in the order of docs/experiments.md (see `benchmarks.experiments.results`)."""
