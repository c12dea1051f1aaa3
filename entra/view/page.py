"""`write_page`: traces as one HTML file that needs no network and no server.

Decisions:
- The page is text, styles, program and data in one file. The program is in `assets/`, plain JavaScript, inlined as it is.
- Numbers are stored as shown: log-prob and importance with 3 decimals, incoming attention with 6 (lift: 3). So each is wrong by
  at most half a unit of its last shown digit (0.0005 nats, 5e-7), and is the number that Python's formatting shows.
  A column that has a number too large for that (2e9 units), or one that is not finite, is stored in float64 instead.
- A trace's tokens are one block of bytes (see `_packed`), deflated, in base64. They are read when the trace is opened. So a
  file of 500 traces of 8,192 tokens, some 40 MB, opens at once.
- A text of a token is stored once for all traces.
- Shades are classes of importance, the same in all traces of a page, with about as many tokens in each.
- Everything that comes from a trace is data: it goes into the page as JSON in which no character can end the element, and
  from there into text nodes. The content security policy allows this one script by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from entra.config import ScoreConfig
from entra.view.lines import marks
from entra.view.trace import Trace
from entra.whole_file import write_whole

# In this order: each may use what stands in an earlier one.
_SCRIPTS = ("data.js", "charts.js", "overview.js", "trace.js", "main.js")
_DECIMALS = {"logprobs": 3, "incoming": 6, "importance": 3}
_LIFT_DECIMALS = 3
_SHADES = 7
_RUN_LENGTHS = (1, 2, 4, 8)


def write_page(
    traces: Iterable[Trace], path: Path, *, title: str, config: ScoreConfig | None, facts: Mapping[str, str] | None = None
) -> None:
    """One self-contained HTML file that shows the traces: a list, each one's tokens, charts, two side by side.

    Args:
        traces: in the order of the list; names are made of anything, but differ. They are read once.
        path: replaced when the whole page is written: a full disk leaves the old one.
        title: the page's heading, such as the name of the file that was scored.
        config: what the traces were scored with; lambda, tau and the statistic stand in the heading. None: nobody knows.
        facts: further ones for the heading, by name, such as the model; the date is today's unless it is among them.

    Raises:
        ValueError: two traces of one name; a trace whose lists differ in length.
        OSError: the file cannot be written.
    """
    decimals = dict(_DECIMALS)
    lift = config is not None and config.attention_statistic == "lift"
    if lift:
        decimals["incoming"] = _LIFT_DECIMALS
    vocabulary: dict[tuple[int, str], int] = {}
    prompts: dict[str, int] = {}
    labels: dict[str, int] = {}
    records: dict[str, dict[str, Any]] = {}
    blocks: list[str] = []
    importance: list[np.ndarray] = []
    for trace in traces:
        if trace.name in records:
            raise ValueError(f"two traces have name={trace.name!r}; a name must be unique within a page, number them")
        _check_lengths(trace)
        words = np.array(
            [vocabulary.setdefault(word, len(vocabulary)) for word in zip(trace.token_ids, trace.pieces, strict=True)],
            dtype="<i4",
        )
        block, kinds = _packed(trace, words, decimals)
        blocks.append(block)
        importance.append(np.asarray(trace.importance, dtype=np.float64))
        records[trace.name] = {
            **_record(trace, words, kinds, prompts.setdefault(trace.prompt, len(prompts))),
            "marked": [(labels.setdefault(mark.label, len(labels)), *mark[1:]) for mark in trace.marked],
        }
    data = {
        "title": title,
        "facts": [*({"date": time.strftime("%Y-%m-%d")} | dict(facts or {})).items(), *_options(config)],
        "attention": "lift" if lift else "incoming attention",
        "ngram": 1 if config is None else config.reward_ngram,
        "decimals": decimals,
        "edges": _edges(importance, decimals["importance"]),
        "ids": [token for token, _ in vocabulary],
        "texts": [text for _, text in vocabulary],
        "prompts": list(prompts),
        "labels": list(labels),
        "traces": list(records.values()),
    }
    write_whole(path, _parts(title, data, blocks), encoding="ascii")


def is_page(path: Path) -> bool:
    """Whether a file is a page that `write_page` wrote; its first lines say so.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return b'<meta name="generator" content="entra inspect">' in file.read(4096)


def _parts(title: str, data: Mapping[str, Any], blocks: Sequence[str]) -> Iterator[str]:
    """The file, in pieces: the page with its program and the data that it starts with, then the tokens of each trace."""
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    content = {
        "title": _ascii(html.escape(title)),
        "policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": _json(data),
    }
    head, tail = _asset("page.html").split("{{tokens}}")
    yield re.sub(r"{{(\w+)}}", lambda match: content[match[1]], head)
    for number, block in enumerate(blocks):
        yield f'<script type="text/plain" id="tokens-{number}">{block}</script>\n'
    yield tail


def _asset(name: str) -> str:
    """A file of the page; `write_page` writes ASCII, so that no editor or server can show it in another encoding."""
    return (files("entra.view") / "assets" / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    """Of an inline element's content, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("ascii")).digest()).decode("ascii")


def _ascii(text: str) -> str:
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _json(value: Any) -> str:
    """JSON in ASCII in which nothing can end a script element or begin a comment or an entity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _options(config: ScoreConfig | None) -> list[tuple[str, str]]:
    if config is None:
        return [("lambda", "not recorded"), ("tau", "not recorded")]
    options = [("lambda", f"{config.attention_weight:g}"), ("tau", f"{config.protect_fraction:g}")]
    defaults = ScoreConfig()
    choices = ("logprob_weight", "attention_statistic", "head_reduction", "ranking_scope", "copy_ngram", "reward_ngram")
    for name in (*choices, "length_adjusted"):
        if getattr(config, name) != getattr(defaults, name):
            options.append((name.replace("_", " "), str(getattr(config, name))))
    return options


def _record(trace: Trace, words: np.ndarray, kinds: str, prompt: int) -> dict[str, Any]:
    """What the list and the charts know of a trace before its tokens are read."""
    reward = trace.reward if trace.reward is not None and math.isfinite(trace.reward) else None
    return {
        "name": trace.name,
        "prompt": prompt,
        "columns": [(name, _shown(value)) for name, value in trace.columns.items()],
        "error": trace.error,
        "reward": reward,
        "tokens": len(words),
        "counted": trace.scores.unprotected,
        "entropy": trace.scores.entropy,
        "repeated": trace.scores.repeated_share,
        "kinds": kinds,
        "leftOut": list(trace.left_out),
        "runs": {
            length: [(words[run.first : run.first + length].tolist(), run.times) for run in trace.most_repeated(length, 8)]
            for length in _RUN_LENGTHS
        },
    }


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _packed(trace: Trace, words: np.ndarray, decimals: Mapping[str, int]) -> tuple[str, str]:
    """A trace's n tokens: base64 of deflated bytes, and for each column of numbers how it is stored.

    First the numbers of the tokens in the vocabulary (int32), then their `marks` (n bytes). Then log-prob, incoming attention
    and importance, each as int32 in units of its last decimal ("i") or as float64 ("f"). Numbers are little-endian, all their
    lowest bytes first, then all their second ones, ...: that way the bytes that are mostly zero cost nothing.
    """
    parts, kinds = [_planes(words), bytes(marks(trace.protected))], ""
    for name, digits in decimals.items():
        numbers = np.asarray(getattr(trace, name), dtype="<f8")
        with np.errstate(over="ignore"):
            units = np.rint(numbers * 10**digits)
        whole = bool(np.all(np.abs(units) < 2**31))
        kinds += "i" if whole else "f"
        parts.append(_planes(units.astype("<i4") if whole else numbers))
    return base64.b64encode(zlib.compress(b"".join(parts), 6)).decode("ascii"), kinds


def _check_lengths(trace: Trace) -> None:
    lengths = {name: len(getattr(trace, name)) for name in ("token_ids", "pieces", "protected", *_DECIMALS)}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"trace {trace.name!r} has {', '.join(f'{count} {name}' for name, count in lengths.items())}; there must be one of "
            "each per token"
        )


def _planes(numbers: np.ndarray) -> bytes:
    return numbers.view(np.uint8).reshape(-1, numbers.itemsize).T.tobytes()


def _edges(importance: Sequence[np.ndarray], digits: int) -> list[float]:
    """Between the shades: the importance at equal shares of all tokens, in shown digits, each once."""
    numbers = np.concatenate([*importance, np.empty(0)])
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return []
    lowest, *shares = (
        round(edge, digits) for edge in np.quantile(numbers, np.arange(_SHADES) / _SHADES, method="lower").tolist()
    )
    return sorted({edge for edge in shares if edge > lowest})
