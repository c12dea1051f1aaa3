"""What views say of traces, in lines of text: numbers, charts, and the completion with its protected tokens marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from entra.view.blocks import bars, column_chart, scatter
from entra.view.marked import Mark
from entra.view.trace import Trace
from entra.view.visible import NEWLINE, has_right_to_left, quoted, visible

PROTECTED = ("«", "»")
IS_PROTECTED, FIRST, LAST = 1, 2, 4
"""What `marks` adds up."""
RUN_LENGTHS = (1, 2, 4, 8)
"""Tokens of the runs whose repetitions are listed."""
_LEFTWARDS = "right-to-left text stands in the order of its letters; the page (--output) lays it out"
"""Few terminals lay it out, and those that do would move tokens away from their marks and colours."""
MARKED = ("⟦", "⟧")
_LEGEND = f"marks, between {' and '.join(MARKED)}: "
COLUMNS = ("trace", "reward", "tokens", "entropy, nats", "repeated, %")


def row_of(trace: Trace) -> list[str]:
    """A trace's cells in a table of `COLUMNS`."""
    if trace.error is not None or trace.reward is None:
        return [visible(trace.name), "error", "", "", ""]
    numbers = [
        f"{trace.reward:.3f}",
        f"{len(trace.token_ids):,}",
        f"{trace.scores.entropy:.2f}",
        f"{100 * trace.scores.repeated_share:.1f}",
    ]
    return [visible(trace.name), *numbers]


def summary(trace: Trace) -> str:
    """A trace's numbers in a line."""
    if trace.error is not None or trace.reward is None:
        return f"error: {visible(trace.error or 'no reward')}"
    scores = trace.scores
    protected = len(trace.token_ids) - scores.unprotected
    what = "repeat" if scores.reward_ngram == 1 else f"end a {scores.reward_ngram}-gram that repeats"
    return (
        f"reward {trace.reward:.3f} · {len(trace.token_ids):,} tokens, {protected:,} protected · "
        f"entropy {scores.entropy:.2f} nats · {100 * scores.repeated_share:.1f} % of the unprotected tokens "
        f"{what} an earlier one"
    )


def about(trace: Trace) -> list[str]:
    """A trace's numbers, its other columns and its prompt, in lines."""
    columns = [f"{visible(name)}: {visible(str(value))}" for name, value in trace.columns.items()]
    prompt = [f"│ {visible(line)}" for line in trace.prompt.split("\n")]
    marked = [_LEGEND + counted] if (counted := marks_line(trace)) else []
    leftwards = any(map(has_right_to_left, (trace.prompt, *trace.pieces)))
    return [
        summary(trace),
        *([" · ".join(columns)] if columns else []),
        *marked,
        *trace.left_out,
        *([_LEFTWARDS] if leftwards else []),
        *prompt,
    ]


def marks(protected: Sequence[bool]) -> list[int]:
    """How each token is shown; every view of protected tokens begins here.

    Returns:
        Of each token 0, or `IS_PROTECTED`, with `FIRST` and `LAST` added at the ends of a run of protected tokens: neighbours
        share their marks or their outline.
    """
    tokens = list(map(bool, protected))
    neighbours = zip([False, *tokens], tokens, [*tokens[1:], False], strict=False)
    return [IS_PROTECTED + FIRST * (not before) + LAST * (not after) if here else 0 for before, here, after in neighbours]


def protected_runs(pieces: Sequence[str], protected: Sequence[bool], around: str = " \n") -> Iterator[tuple[str, bool]]:
    """The text in parts, and of each whether its tokens are protected: how every text shows them.

    Args:
        pieces: of the tokens.
        protected: of each token.
        around: characters at the ends of neighbouring protected tokens that are not shown as protected, unless there are no
            others: marks stand at words.
    """
    run = ""
    for piece, mark in zip(pieces, marks(protected), strict=True):
        if mark & FIRST and run:
            yield run, False
            run = ""
        run += piece
        if mark & LAST:
            inside = run.strip(around) or run
            before, _, after = run.partition(inside) if inside else (run, "", "")
            for part, marked in ((before, False), (inside, True), (after, False)):
                if part:
                    yield part, marked
            run = ""
    if run:
        yield run, False


def marks_line(trace: Trace) -> str:
    """The labels of a trace's marks, each with how many there are, or where the only place is; empty where there are none."""
    found: dict[str, list[Mark]] = {}
    for mark in trace.marked:
        found.setdefault(mark.label, []).append(mark)
    return " · ".join(
        f"{visible(label)} "
        + (f"at character {of[0].start:,} (token {of[0].first + 1:,})" if len(of) == 1 and of[0].is_place else f"{len(of):,}")
        for label, of in found.items()
    )


def marked_pieces(trace: Trace) -> list[str]:
    """The tokens' texts, with the labels of marks where these begin and a bracket where they end."""
    begin, end = MARKED
    pieces = list(trace.pieces)
    signs: dict[int, str] = {}
    ends: Counter[int] = Counter()
    for mark in trace.marked:
        label = visible(mark.label)
        signs[mark.first] = signs.get(mark.first, "") + begin + label + (end if mark.is_place else ": ")
        if not mark.is_place:
            ends[mark.last] += 1
    for i, closed in ends.items():
        text = pieces[i].rstrip(" \n")
        pieces[i] = text + end * closed + pieces[i][len(text) :]
    for i, sign in signs.items():
        text = pieces[i].lstrip(" ")
        pieces[i] = pieces[i][: len(pieces[i]) - len(text)] + sign + text
    return pieces


def with_marks(trace: Trace) -> list[str]:
    """The completion in lines: neighbouring protected tokens between marks, and what the row itself marks between others."""
    parts = protected_runs(marked_pieces(trace) if trace.marked else trace.pieces, trace.protected)
    lines = [visible(line) for line in "".join(part.join(PROTECTED) if marked else part for part, marked in parts).split("\n")]
    return [line + NEWLINE for line in lines[:-1]] + lines[-1:]


def charts(trace: Trace, width: int) -> list[str]:
    """Importance over position and what comes most often, in lines."""
    lines = column_chart(trace.importance, width, 8, label="importance, in nats", axis="token")
    for length in RUN_LENGTHS:
        what = "unprotected tokens" if length == 1 else f"runs of {length} tokens, protected or not"
        found = trace.most_repeated(length, limit=8 if length == 1 else 5)
        lines += ["", *bars(found, width, label=f"most repeated {what}, times")]
    return lines


def rewards_chart(traces: Sequence[Trace], width: int, height: int, marked: int | None = None) -> list[str]:
    """Reward against length of traces that have a reward."""
    points: list[tuple[float, float]] = [(len(trace.token_ids), trace.reward or 0.0) for trace in traces]
    return scatter(points, width, height, x="length, tokens", y="reward", marked=marked)


def token_facts(trace: Trace, token: int) -> list[str]:
    """What is known of a token, in lines."""
    times = trace.scores.counts[trace.token_ids[token]]
    marked = [mark for mark in trace.marked if mark.first <= token <= mark.last]
    share = f" ({100 * times / trace.scores.unprotected:.1f} %)" if trace.scores.unprotected else ""
    return [
        f"token {token + 1:,} of {len(trace.token_ids):,}: {quoted(trace.pieces[token])}, id {trace.token_ids[token]}, "
        + ("protected" if trace.protected[token] else "not protected"),
        f"log-prob {trace.logprobs[token]:.3f} nats · incoming attention {trace.incoming[token]:.6f} · "
        f"importance {trace.importance[token]:.3f}",
        f"occurs {times:,} times among the {trace.scores.unprotected:,} unprotected tokens{share}",
        *(["marked: " + (", ".join(visible(mark.label) for mark in marked) or "nothing")] if trace.marked else []),
    ]
