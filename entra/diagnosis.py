"""Will it work here? A model, these versions and these training arguments, looked at before a run.

    print(entra.doctor("smollm2"))

The self-check scores one short text and compares it twice. With eager attention, the only implementation of transformers that
shows its attention: a wrong layer, scale, window, softcap or logit transform is off by its own size there. And with the
pure-PyTorch reference on the same inputs (`entra.verify`), which holds the kernels to float32 rounding.

What training costs is told from TRL's own rule for when it makes a log-prob pass; `tests/entra/test_doctor.py` holds that to
what trainers then do.
"""

from __future__ import annotations

import bisect
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from entra.capture import CapturedLayer, capture_incoming_attention
from entra.config import ScoreConfig
from entra.forward import (
    _CPU_TOKEN_BUDGET,
    _DEVICE_TOKEN_BUDGET,
    _evaluation_mode,
    _lock,
    check_scorable,
    token_signals,
    unwrapped,
)
from entra.name_clash import name_clash
from entra.policy import resolve_policy
from entra.rollout import Rollout
from entra.rope import RopeGroups, forgetful_rope, sees_left_pads
from entra.verify import forward_budget, verify
from entra_kernels._checks import choose_backend

_PROMPT = "What is 17 + 26?"
_COMPLETION = (
    " 7 + 6 = 13, so write 3 and carry 1. Then 1 + 2 + 1 = 4, and the answer is 43. Wait, let me check: 17 + 26 is 43."
)
_RANDOM_TOKENS = 48  # without a tokenizer
_TIMED_TOKENS = 256
_LONGEST_ROW = 2**31

_DISTRIBUTION = "entra-reward"
_PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "vllm")


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    """What was looked at, such as "versions"."""
    state: Literal["ok", "note", "wrong"]
    """"wrong" stands in the way of a run, "note" does not."""
    text: str
    """What was found. If it is wrong, with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `doctor` found. Print it: one line for each finding."""

    findings: tuple[Finding, ...]
    """All findings, in the order in which `doctor` looked."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that stand in the way, each with its remedy."""
        return tuple(finding for finding in self.findings if finding.state == "wrong")

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        return "\n".join(f"{finding.state:<5}  {finding.name:<{width}}  {finding.text}" for finding in self.findings)


def doctor(
    model: Any, tokenizer: Any | None = None, *, args: Any | None = None, config: ScoreConfig | None = None
) -> Diagnosis:
    """Whether this model can be scored and trained on with these versions, and what that costs.

        assert entra.doctor(model, tokenizer, args=args).ok

    It runs some forwards of a short text, one of them with eager attention. Afterwards the model is as before.

    Args:
        model: a transformers causal LM, bare or wrapped, a folder or hub name, or "smollm2".
        tokenizer: the model's. None: the one that belongs to the name; for a model object, random ids are scored.
        args: the trl.GRPOConfig or trl.RLOOConfig of the run. None: TRL's defaults, for what it costs.
        config: the options of the method; None: the defaults.

    Returns:
        The findings. `ok` is False if a number would be wrong, a run would be refused, or this version of ENTRA does not work
        with an installed version.

    Raises:
        TypeError: `model` is neither a torch module nor a name.
        OSError, RuntimeError: the model cannot be loaded by that name.

    Source: docs/training.md, before a run.
    """
    config = ScoreConfig() if config is None else config
    policy = resolve_policy(model, tokenizer)
    if policy is None:
        raise TypeError("model=None must be a transformers causal LM, a folder, a hub name or 'smollm2'")
    inner = unwrapped(policy.model)
    findings = _versions() + _attempt("tokenizer", _tokenizer, policy.tokenizer, args)
    scorable = _attempt("capture", _capture, policy.model, inner, policy.tokenizer, config)
    findings += scorable
    if all(finding.state != "wrong" for finding in scorable):
        findings += _attempt("self-check", _self_check, policy.model, policy.tokenizer, config)
    findings += _attempt("training", _training, inner, args, config)
    if all(finding.state != "wrong" for finding in findings):
        findings += _attempt("cost", _cost, policy.model, inner, policy.tokenizer, args, config)
    return Diagnosis(findings=tuple(findings))


def _attempt(name: str, look: Callable[..., list[Finding]], *arguments: Any) -> list[Finding]:
    """The findings of `look`; what our own code refuses says what is wrong and what helps."""
    try:
        return look(*arguments)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        return [Finding(name, "wrong", " ".join(str(error).split()) or type(error).__name__)]


def _versions() -> list[Finding]:
    """What is installed, against the ranges that our own package names."""
    found = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    findings = [Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))]
    if (clash := name_clash()) is not None:
        findings.append(Finding("versions", "wrong", clash))
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        text = f"not checked: {_DISTRIBUTION} is not installed, its files are only on the path; pip install -e . in a clone"
        return [*findings, Finding("versions", "note", text)]
    for requirement in map(_without_marker, requirements):
        version = found.get(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name} {version} is outside {requirement.specifier}; pip install '{requirement}'"
            findings.append(Finding("versions", "wrong", text))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_marker(text: str) -> Any:
    """A requirement, an extra's for everybody: what is installed must fit, whoever asked for it."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    requirement.marker = None
    return requirement


def _tokenizer(tokenizer: Any, args: Any) -> list[Finding]:
    if tokenizer is None:
        return [Finding("tokenizer", "note", "none: random ids are scored, and training needs one")]
    if args is not None and tokenizer.eos_token_id is None:
        from entra.trl import _check_tokenizer

        _check_tokenizer(tokenizer)
    template = "a chat template" if getattr(tokenizer, "chat_template", None) else "no chat template (prompts must be text)"
    return [Finding("tokenizer", "ok", f"{type(tokenizer).__name__}, EOS {tokenizer.eos_token!r}, {template}")]


def _sample(tokenizer: Any, inner: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and a completion that the model's context holds."""
    text_config = inner.config.get_text_config(decoder=True)
    if tokenizer is None:
        ids = torch.randint(text_config.vocab_size, (_RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        prompt, completion = ids[:8], ids[8:]
    else:
        prompt = tokenizer(_PROMPT)["input_ids"]
        completion = tokenizer(_COMPLETION, add_special_tokens=False)["input_ids"]
    longest = getattr(text_config, "max_position_embeddings", None) or _TIMED_TOKENS
    return prompt, completion[: max(1, longest - len(prompt))]


def _capture(model: Any, inner: Any, tokenizer: Any, config: ScoreConfig) -> list[Finding]:
    check_scorable(model)
    prompt, completion = _sample(tokenizer, inner)
    layer, q, k = _look(inner, prompt + completion, config)
    implementation = inner.get_submodule(layer.name).config._attn_implementation
    depth = inner.config.get_text_config(decoder=True).num_hidden_layers
    where = f"{layer.name}, index {layer.index} of {depth} layers, {layer.layer_type}"
    what = [f"{q.shape[1]} query heads", f"{k.shape[1]} kv heads", f"head dim {q.shape[3]}"]
    what += [f"{name} {value:g}" for name, value in (("window", layer.sliding_window), ("softcap", layer.softcap)) if value]
    what += ["sinks"] * layer.has_sinks
    backend = choose_backend(config.backend, q)
    lse = f"log-sum-exp from {layer.lse_source}" if layer.lse_source else "log-sum-exp of its own"
    return [
        Finding("capture", "ok", f"{type(inner).__name__} with {implementation} attention"),
        Finding("layer", "ok", f"{where}: {', '.join(what)}"),
        Finding("backend", "ok", f"{backend} on {q.device}, {str(q.dtype).removeprefix('torch.')}, {lse}"),
    ]


def _look(inner: Any, ids: list[int], config: ScoreConfig) -> tuple[CapturedLayer, Tensor, Tensor]:
    """The scored layer as one forward shows it, with its q [1, H, N, D] and k [1, G, N, D]."""
    shown: list[Tensor] = []
    with (
        _lock(inner),
        torch.no_grad(),
        _evaluation_mode(inner),
        forgetful_rope(inner) as forget,
        capture_incoming_attention(inner, backend=config.backend) as captured,
    ):
        forget()
        captured.inspect = lambda q, k, *_: shown.extend((q, k))
        inner(input_ids=_row(inner, ids), use_cache=False)
    return captured.layer, shown[0], shown[1]


def _row(inner: Any, ids: list[int]) -> Tensor:
    return torch.tensor([ids], device=inner.get_input_embeddings().weight.device)


def _self_check(model: Any, tokenizer: Any, config: ScoreConfig) -> list[Finding]:
    """Log-probs and incoming attention of a short text, against eager attention and against the reference."""
    inner = unwrapped(model)
    prompt, completion = _sample(tokenizer, inner)
    plain = replace(config, attention_statistic="mean", head_reduction="mean", ranking_scope="completion")
    rollout = Rollout(model, tokenizer, [None], [prompt], [completion])
    sequence = rollout.sequences[0]
    signals = rollout.signals(plain)[0]
    layer, q, _ = _look(inner, sequence.prompt + sequence.completion, plain)
    logprobs, incoming = _eagerly(inner, sequence.prompt + sequence.completion, layer)
    n, budget = len(sequence.completion), forward_budget(q.dtype)
    l, mu = logprobs[-n:].cpu(), incoming[-n:].cpu()
    off_l = float((signals.logprobs.cpu() - l).abs().mean())
    off_mu = float((signals.incoming.cpu() - mu).abs().sum() / mu.sum().clamp(min=1e-20))
    remedy = (
        "; scores of this model would be wrong: try ScoreConfig(backend='torch'), attn_implementation='eager' and the newest "
        "transformers, and report it with model and versions"
    )
    findings = [
        _held("log-probs", off_l, budget, f"nats from eager attention's, the mean of {n} tokens", remedy),
        _held("attention", off_mu, budget, "of its sum from eager attention's", remedy),
    ]
    deviation = verify(rollout, 0, config)
    breach = deviation.breach()
    if breach is None:
        parts = ", ".join(f"{check.name} {check.deviation:.1e}" for check in deviation.checks[:2])
        findings.append(Finding("kernels", "ok", f"from the reference on the same inputs: {parts}"))
    else:
        findings.append(Finding("kernels", "wrong", breach))
    return findings


def _held(name: str, deviation: float, budget: float, what: str, remedy: str) -> Finding:
    right = deviation <= budget  # NaN is wrong
    return Finding(name, "ok" if right else "wrong", f"{deviation:.1e} {what} (budget {budget:g}){'' if right else remedy}")


def _eagerly(inner: Any, ids: list[int], layer: CapturedLayer) -> tuple[Tensor, Tensor]:
    """Log-probs [N - 1] of all tokens but the first, and mean attention from future tokens [N], by eager attention."""
    weights: list[Any] = []
    module = inner.get_submodule(layer.name)
    handle = module.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    try:
        with _lock(inner), torch.no_grad(), _evaluation_mode(inner), _eager_attention(inner), forgetful_rope(inner) as forget:
            forget()
            logits = inner(input_ids=_row(inner, ids), use_cache=False).logits
    finally:
        handle.remove()
    if not weights or weights[-1] is None:
        raise RuntimeError(
            f"{type(module).__name__} does not return its attention under eager attention, so nothing can be compared; score "
            "with another model, or check by hand"
        )
    matrix = weights[-1][0].double().mean(dim=0)  # [N, N]
    tokens = len(ids)
    later = torch.arange(tokens - 1, -1, -1, device=matrix.device)
    if layer.sliding_window is not None:
        later = later.clamp(max=layer.sliding_window - 1)
    incoming = matrix.tril(diagonal=-1).sum(dim=0) / later.clamp(min=1)
    log_shares = logits[0, :-1].double().log_softmax(dim=-1)
    targets = torch.tensor(ids[1:], device=log_shares.device)
    return log_shares.gather(1, targets[:, None])[:, 0].float(), incoming.float()


@contextmanager
def _eager_attention(inner: nn.Module) -> Iterator[None]:
    """Every module's attention runs eagerly; afterwards the configs say what they said."""
    configs: dict[int, Any] = {id(module.config): module.config for module in inner.modules() if hasattr(module, "config")}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _training(inner: Any, args: Any, config: ScoreConfig) -> list[Finding]:
    """Whether a run is refused, whether scores ride on TRL's log-prob pass, and how the rows of that pass lie."""
    from entra.prompts import why_whole

    reason = why_whole(inner, config)
    prompts = "a prompt that several completions share runs once" if reason is None else f"every row runs whole: {reason}"
    own = f"padded on the right, without a mask, up to {_budget(inner, config):,} tokens a forward; {prompts}"
    if args is None:
        text = "with TRL's defaults scoring costs one no-grad forward of the generated batch; give the run's arguments to know"
        return [Finding("training", "note", text), Finding("layout", "ok", own)]
    from entra.trl import _check_arguments, _check_sharding

    _check_arguments({"args": args, "reward_funcs": []})
    _check_sharding(SimpleNamespace(**(getattr(args, "fsdp_plugin_args", None) or {})))
    reasons = _why_a_forward(inner, args, config)
    if reasons:
        text = f"scoring costs one no-grad forward of the generated batch: {'; '.join(reasons)}"
        return [Finding("training", "ok", text), Finding("layout", "ok", own)]
    text = "scores ride on TRL's own log-prob pass, no forward is added"
    if rows := _rows_with_a_forward(inner, args):
        text += f" but for {', and for '.join(rows)}"
    layout = "packed" if getattr(args, "padding_free", False) else "padded on both sides"
    return [Finding("training", "ok", text), Finding("layout", "ok", f"{layout}, as TRL's pass")]


def _why_a_forward(inner: Any, args: Any, config: ScoreConfig) -> list[str]:
    """Why TRL's log-prob pass cannot carry the scores, in words; empty where it does."""
    from trl import RLOOConfig

    from entra.trl import _has_dropout

    reasons = []
    if not isinstance(args, RLOOConfig):
        every = args.steps_per_generation * args.num_iterations
        corrected = args.use_vllm and args.vllm_importance_sampling_correction
        if args.gradient_accumulation_steps % every == 0 and not corrected:
            reasons.append(
                f"TRL makes no pass where gradient_accumulation_steps={args.gradient_accumulation_steps} is a multiple of "
                f"steps_per_generation * num_iterations = {every}"
            )
    if args.temperature != 1.0:
        reasons.append(f"temperature={args.temperature:g} divides TRL's log-probs")
    if config.ranking_scope != "completion":
        reasons.append(f"ranking_scope={config.ranking_scope!r} needs the prompt's log-probs")
    if _has_dropout(inner, training=True):
        reasons.append("the model has dropout, which is on in TRL's pass")
    return reasons


def _rows_with_a_forward(inner: Any, args: Any) -> list[str]:
    """Which rows do not ride on TRL's log-prob pass where the others do, in words."""
    rows = ["completions that are cut off (mask_truncated_completions)"] if args.mask_truncated_completions else []
    if sees_left_pads(inner):
        rows.append("rows whose prompt is shorter than the batch's longest (this model reads the pads before it)")
    groups = RopeGroups(inner)
    limit = bisect.bisect_right(range(_LONGEST_ROW), groups.of(1), key=groups.of) - 1
    if limit < _LONGEST_ROW - 1:
        rows.append(f"rows of batches padded to more than {limit:,} tokens that have another RoPE there than alone")
    return rows


def _cost(model: Any, inner: Any, tokenizer: Any, args: Any, config: ScoreConfig) -> list[Finding]:
    """Time and memory of scoring, from one timed row."""
    text_config = inner.config.get_text_config(decoder=True)
    prompt, completion = _sample(tokenizer, inner)
    longest = getattr(text_config, "max_position_embeddings", None) or _TIMED_TOKENS
    budget = _budget(inner, config)
    tokens = max(2, min(_TIMED_TOKENS, longest, budget))
    ids = ((prompt + completion) * tokens)[:tokens]
    seconds = _seconds(model, ids, config)
    weights = sum(weight.numel() * weight.element_size() for weight in inner.parameters())
    extra = budget * _bytes_a_token(inner, text_config)
    text = (
        f"{seconds / tokens * 1_000:.2g} s for 1,000 tokens in rows of {tokens}; weights {_size(weights)}, a forward of "
        f"{budget:,} tokens about {_size(extra)} more"
    )
    findings = [Finding("cost", "ok", text)]
    if args is not None and _why_a_forward(inner, args, config):
        rows, length = args.per_device_train_batch_size * args.steps_per_generation, args.max_completion_length
        whole = length + len(prompt)
        a_batch = rows * whole * seconds / tokens * _slowdown(inner, text_config, tokens, whole)
        text = f"about {a_batch:.2g} s for each generated batch of {rows} rows with {length:,} new tokens, by one process"
        findings.append(Finding("cost", "ok", text))
    return findings


def _budget(inner: Any, config: ScoreConfig) -> int:
    """Tokens of one forward."""
    on_cpu = inner.get_input_embeddings().weight.device.type == "cpu"
    return config.token_budget or (_CPU_TOKEN_BUDGET if on_cpu else _DEVICE_TOKEN_BUDGET)


def _seconds(model: Any, ids: list[int], config: ScoreConfig) -> float:
    """Of scoring one row, the second time."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        signals = token_signals(model, [ids], [len(ids) - 1], config)
        float(signals[0].logprobs.sum())  # waits for a GPU
        seconds = time.perf_counter() - start
    return seconds


def _slowdown(inner: Any, text_config: Any, short: int, long: int) -> float:
    """Time a token in rows of `long` tokens against rows of `short`: attention is the part that grows with the row."""
    weights = sum(weight.numel() for weight in inner.parameters())
    attention = getattr(text_config, "num_hidden_layers", 1) * text_config.hidden_size
    return (weights + long * attention) / (weights + short * attention)


def _bytes_a_token(inner: Any, text_config: Any) -> int:
    """Of what a layer holds at once: hidden states with their norms and q, k, v, and the MLP's three products."""
    inside = getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size
    size: int = inner.get_input_embeddings().weight.element_size()
    return size * (6 * text_config.hidden_size + 3 * inside)


def _size(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**29 else f"{count / 2**20:.3g} MiB"
