"""One forward of the policy that yields log-probabilities and incoming attention of chosen tokens, and no logits.

A hook on the language-model head takes the hidden states on their way in, turns those of the wanted positions into
log-probabilities in chunks, and lets only the last position through. So the model computes [B, 1, vocabulary] logits instead of
[B, N, vocabulary], whatever its class, and the work happens while the head's weight is whole (FSDP2 and ZeRO-3 gather it only
for the head's own forward). What the model does to its logits after the head (scaling, softcap) is read from its config and
then checked against the logits that it returns, so an unknown transform is an error and never a silently wrong number.

Rows are padded on the right and run without an attention mask, which is exact for causal models: no token sees a later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entra.capture import capture_incoming_attention
from entra.config import ScoreConfig
from entra_kernels import linear_token_logprobs, token_logprobs

# Logits of one chunk when the head must be called as a module (LoRA on the head, quantised heads): 2**24 are 64 MiB in float32.
_CHUNK_LOGITS = 2**24

# Padded tokens of one forward when the config leaves it open. 48 rows of mixed length on 2 CPU cores took 22 s with 1,024 and
# 29 s with 16,384 (SmolLM2-135M): a CPU is busy with a single row, and padding only adds to it.
_CPU_TOKEN_BUDGET, _DEVICE_TOKEN_BUDGET = 1_024, 16_384


class TokenSignals(NamedTuple):
    """What the method needs of one row: `logprobs` and `incoming`, float32 [n] each, for its last n tokens."""

    logprobs: Tensor
    incoming: Tensor


class _LogitTransform(NamedTuple):
    """What the model does between head and logits: `softcap * tanh(scale * z / softcap)`."""

    scale: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def token_signals(model: Any, rows: Sequence[Sequence[int]], last: Sequence[int], config: ScoreConfig) -> list[TokenSignals]:
    """Log-probabilities and incoming attention of the last `last[r]` tokens of each row.

    Args:
        model: a transformers causal LM or a wrapper around one; its mode, config and hooks are as before afterwards.
        rows: token ids; row r needs at least last[r] + 1 of them, because the first token of a sequence has no log P.
        last: how many tokens of each row are wanted, at least 1.
        config: `token_budget`, `attention_statistic`, `head_reduction` and `backend` are used.

    Returns:
        One `TokenSignals` per row, on the model's device, not dependent on how the rows were split into forwards.

    Raises:
        ValueError: no layer of the model can be scored (see `entra.capture`).
        RuntimeError: the model has no head that can be hooked, or changes its logits in a way that is not known.
    """
    model = unwrapped(model)
    signals: list[TokenSignals | None] = [None] * len(rows)
    with torch.no_grad(), _evaluation_mode(model):
        device = model.get_input_embeddings().weight.device
        budget = config.token_budget or (_CPU_TOKEN_BUDGET if device.type == "cpu" else _DEVICE_TOKEN_BUDGET)
        for batch in _micro_batches([len(row) for row in rows], budget):
            results = _forward(model, device, [rows[r] for r in batch], [last[r] for r in batch], config)
            for r, result in zip(batch, results, strict=True):
                signals[r] = result
    return [signal for signal in signals if signal is not None]


def unwrapped(model: Any) -> Any:
    """The model inside DDP, DeepSpeed (`.module`) and torch.compile (`._orig_mod`); FSDP2 and PEFT need no unwrapping."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and not hasattr(model, "config"):
            inner = getattr(model, "module", None)
        if inner is None:
            return model
        model = inner


def _micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Row indices, longest rows first, so that the padded tokens of a batch stay within the budget (one row always fits)."""
    batches: list[list[int]] = []
    for r in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(r)
        else:
            batches.append([r])
    return batches


def _forward(
    model: Any, device: torch.device, rows: list[Sequence[int]], last: list[int], config: ScoreConfig
) -> list[TokenSignals]:
    length = torch.tensor([len(row) for row in rows])
    tokens = int(length.max())
    input_ids = torch.zeros(len(rows), tokens, dtype=torch.long)
    for r, row in enumerate(rows):
        input_ids[r, : len(row)] = torch.as_tensor(row)
    # The token at position i is predicted by the hidden state at i - 1.
    positions = torch.cat(
        [r * tokens + torch.arange(n - m - 1, n - 1) for r, (n, m) in enumerate(zip(length, last, strict=True))]
    )
    targets = input_ids.view(-1)[positions + 1].to(device)
    positions, input_ids = positions.to(device), input_ids.to(device)
    with (
        _head_logprobs(model, positions, targets, config.backend) as head,
        capture_incoming_attention(
            model,
            length=length.to(device),
            statistic=config.attention_statistic,
            head_reduction=config.head_reduction,
            backend=config.backend,
        ) as captured,
    ):
        output = model(input_ids=input_ids, use_cache=False)
    head.check(output.logits)
    logprobs = head.logprobs.to(device).split(last)
    incoming = captured.incoming.to(device)
    return [
        TokenSignals(logprobs[r], incoming[r, n - m : n]) for r, (n, m) in enumerate(zip(length.tolist(), last, strict=True))
    ]


class _HeadLogprobs:
    """Hooks of the language-model head: log-probabilities of the wanted positions, logits of the last one only."""

    def __init__(self, transform: _LogitTransform, positions: Tensor, targets: Tensor, backend: str) -> None:
        self._transform = transform
        self._positions = positions
        self._targets = targets
        self._backend = backend
        self._busy = False
        self._last: Tensor | None = None
        self._logprobs: Tensor | None = None

    @property
    def logprobs(self) -> Tensor:
        """float32 [positions]; RuntimeError when the head never ran."""
        if self._logprobs is None:
            raise RuntimeError(
                "the model's forward did not call the head that get_output_embeddings() names; pass another model"
            )
        return self._logprobs

    def before(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._busy:
            return None
        hidden = args[0]
        self._busy = True  # the head may be called below, and must then run as it is
        try:
            self._logprobs = self._compute(head, hidden.reshape(-1, hidden.shape[-1])[self._positions.to(hidden.device)])
        finally:
            self._busy = False
        return (hidden[:, -1:], *args[1:])

    def after(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self._busy:
            self._last = output

    def _compute(self, head: nn.Module, hidden: Tensor) -> Tensor:
        targets = self._targets.to(hidden.device)
        weight = getattr(head, "weight", None)
        if (
            type(head).forward is nn.Linear.forward
            and "forward" not in vars(head)
            and type(weight) is nn.Parameter
            and weight.is_floating_point()
        ):
            return linear_token_logprobs(
                hidden.to(weight.dtype),
                weight,
                targets,
                bias=head.bias,  # type: ignore[arg-type]
                logit_scale=self._transform.scale,
                softcap=self._transform.softcap,
                backend=self._backend,
            )
        rows = max(1, _CHUNK_LOGITS // int(getattr(head, "out_features", _CHUNK_LOGITS // 64)))
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.cat([token_logprobs(self._transform(head(h).float()), t, backend=self._backend) for h, t in chunks])

    def check(self, logits: Tensor) -> None:
        """Raises a RuntimeError when the model's own logits are not the head's output after the known transform."""
        if self._last is None:
            raise RuntimeError(
                "the model's forward did not call the head that get_output_embeddings() names; pass another model"
            )
        expected = self._transform(self._last.float())
        got = logits.float().to(expected.device)
        # The model applies the transform in its own precision; a wrong transform is off by far more than one rounding.
        tolerance = 4 * torch.finfo(logits.dtype).eps * expected.abs().amax().nan_to_num(0.0, 0.0) + 1e-6
        if got.shape != expected.shape or bool(((got - expected).abs() > tolerance).any()):
            raise RuntimeError(
                f"the model changes its head's output in a way that is not known (known: logit_scale={self._transform.scale}, "
                f"softcap={self._transform.softcap}); score with your own logprobs=..., or with another model"
            )


@contextmanager
def _head_logprobs(model: Any, positions: Tensor, targets: Tensor, backend: str) -> Iterator[_HeadLogprobs]:
    head = model.get_output_embeddings()
    if head is None:
        raise RuntimeError(
            f"{type(model).__name__} has no language-model head (get_output_embeddings() is None); pass a causal LM"
        )
    hooks = _HeadLogprobs(_logit_transform(model), positions, targets, backend)
    handles = [head.register_forward_pre_hook(hooks.before), head.register_forward_hook(hooks.after)]
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()


def _logit_transform(model: Any) -> _LogitTransform:
    """From the config: Cohere multiplies by logit_scale, Granite divides by logits_scaling, Falcon-H1 multiplies by
    lm_head_multiplier, Gemma 2 to 4 cap at final_logit_softcapping."""
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return _LogitTransform(scale, float(softcap) if softcap else None)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; afterwards every submodule is in the mode it was in, also when they differed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
