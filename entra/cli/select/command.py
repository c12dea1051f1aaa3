"""`entra select`: of several completions of a prompt those that are right and least redundant, or pairs, for TRL's trainers.

Decisions taken here:

- Nothing is scored and no model is loaded: all comes from what `entra score` wrote.
- Values are compared after rounding, because scores are float32. Ties go to the fewest tokens, then to the first row.
- A pair is the best completion of a prompt and a rejected one, beginning with the worst. Two that hardly differ make none.
- A pair carries the columns that say the same of all completions of a prompt, such as a problem's answer.
- What this command wrote is replaced when it is asked for again; no other file is. The record beside it tells them apart.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entra import __version__
from entra.cli import CommandError, say
from entra.cli.columns import SCORE_COLUMNS, key_of
from entra.cli.formats import part_of
from entra.cli.output import Stream, check_destination, json_value
from entra.cli.select.completions import OWN, Completion, Input, look, open_scores, read
from entra.source import PIPE, SIDECAR
from entra.whole_file import write_whole

_DESCRIPTION = """\
Of several completions of a prompt, keep the right and least redundant one, for SFT or rejection sampling (columns prompt and
completion). With --pairs, write it beside a more redundant one, for DPO (prompt, chosen, rejected). The input is what entra
score wrote, with the record beside it. A column, correct by default, says which completions are right: true or at least 1. Null
is unknown and stays out. So do rows with an error, and those whose column complete is false, truncated is true, or
finish_reason is length. Nothing is scored again. OUTPUT.meta.json records what was kept and what was not. The columns
select_... say why a row is there."""


class _Measure(NamedTuple):
    """What completions are compared by."""

    meaning: str
    least: float
    """A smaller difference than this makes no pair, unless --min-difference says so."""
    digits: int
    """Decimals that count. r is float32, and D is r times the number of tokens."""
    sign: int
    """1 where more is more redundant, -1 where less is."""

    def redundancy(self, one: Completion) -> float:
        """What completions are ordered by: less is better."""
        return self.sign * round(one.value, self.digits)


_MEASURES = {
    "redundant_tokens": _Measure("D = M (1 - r) of M unprotected tokens", 1.0, 2, 1),
    "r": _Measure("the reward at a fixed length", 0.01, 5, -1),
    "tokens": _Measure("the number of tokens", 1.0, 0, 1),
}

# Columns that would change how TRL's trainers read prompt, completion, chosen and rejected. With a column `text`, for example,
# SFTTrainer adds no EOS to completions.
_NOT_CARRIED = {
    *("prompt", "completion", "chosen", "rejected", "messages", "conversations", "text", "label", "image", "images"),
    *("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths", "ref_chosen_logps", "ref_rejected_logps"),
}


class _Picked(NamedTuple):
    """What becomes a row of the output."""

    best: Completion
    """Kept, or chosen."""
    rejected: Completion | None
    """Of a pair."""
    group: list[Completion]
    """All completions of the prompt that could have been."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra select` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser("select", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("scores", type=Path, help="what entra score wrote, or - for stdin")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the output, in the formats of entra score; - is stdout"
    )
    parser.add_argument(
        "--by",
        choices=tuple(_MEASURES),
        default="redundant_tokens",
        help="; ".join(f"{name}: {measure.meaning}" for name, measure in _MEASURES.items()) + " (default: %(default)s)",
    )
    parser.add_argument(
        "--length-adjusted",
        type=int,
        metavar="N",
        help="for --by r: of so many unprotected tokens, drawn at random (default: as it was scored, else the fewest of a "
        "prompt's completions). A number other than that of the scoring needs the columns of entra score --details",
    )
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="at most N rows a prompt (default: %(default)s)")
    parser.add_argument("--pairs", action="store_true", help="write pairs: the best completion, and one that is rejected")
    parser.add_argument(
        "--rejected",
        choices=("redundant", "wrong"),
        default="redundant",
        help="of --pairs: the most redundant right completions, or the most redundant wrong ones (default: %(default)s)",
    )
    parser.add_argument(
        "--min-difference",
        type=float,
        metavar="X",
        help="of --pairs: only where the rejected one is more redundant by at least X, in the unit of --by (default: "
        + ", ".join(f"{measure.least:g} for {name}" for name, measure in _MEASURES.items())
        + "; wrong ones may be less redundant)",
    )
    parser.add_argument(
        "--correct-column",
        metavar="COLUMN",
        default="correct",
        help="right where it is true or at least 1, unknown where it is null (default: %(default)s)",
    )
    parser.add_argument("--all-right", action="store_true", help="take every completion for right, without such a column")
    parser.add_argument("--prompt-column", metavar="COLUMN", help="text or chat messages (default: as it was scored)")
    parser.add_argument("--completion-column", metavar="COLUMN", help="the same (default: as it was scored)")
    parser.add_argument("--prefix", help="what stands before the names of entra score's columns (default: found)")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra select` with parsed options.

    Raises:
        CommandError: something stops it, or there is nothing to write. Rows that cannot be used do not stop it.
    """
    _check_options(options)
    source, scored = open_scores(options)
    if not source.rows:
        raise CommandError(f"{options.scores} has no rows; give what entra score wrote")
    found = look(options, source, scored)
    prompts, left_out = read(options, source, found)
    picked: list[_Picked] = []
    empty: Counter[str] = Counter()
    for group in prompts:
        of_prompt = _picked(group, options)
        if isinstance(of_prompt, str):
            empty[of_prompt] += 1
        else:
            picked += of_prompt
    what = "pairs" if options.pairs else "completions"
    lines = [
        f"  left out  {left_out.total():,} of {_number(source.rows, 'rows')}{_listed(left_out)}",
        f"  nothing   for {empty.total():,} of {_number(len(prompts), 'prompts')}{_listed(empty)}",
    ]
    notes = [f"  note      {note}" for note in found.notes]
    if not picked:
        say(*lines, *notes)
        raise CommandError(f"nothing to write: no prompt of {options.scores} has {what} to keep")
    names, misleading = _carried(options, found, picked)
    if misleading:
        notes.append(f"  note      not carried, because TRL takes it for something else: {', '.join(misleading)}")
    record = {
        "written_by": "entra select",
        "entra": __version__,
        "input": {"file": str(options.scores), **source.record()},
        "options": {name: value for name, value in vars(options).items() if name not in ("run", "command", "scores", "output")},
        "read_as": found._asdict(),
        "left_out": dict(left_out),
        "prompts": len(prompts),
        f"prompts_without_{what}": dict(empty),
        what: len(picked),
        "not_carried": misleading,
    }
    notes += _write(options.output, [_row(one, names, options) for one in picked], record)
    having = _number(len(prompts) - empty.total(), "prompts")
    say(f"{options.output}: {_number(len(picked), what)} of {having}, by {options.by}", *lines)
    say(*_averages(options, prompts, picked), *notes)


def _check_options(options: argparse.Namespace) -> None:
    if options.per_prompt < 1:
        raise CommandError(f"--per-prompt {options.per_prompt} must be at least 1 row")
    if options.min_difference is not None and not 0 <= options.min_difference < math.inf:
        raise CommandError(f"--min-difference {options.min_difference:g} must be a finite number, at least 0")
    if options.length_adjusted is not None and options.length_adjusted < 2:
        raise CommandError(f"--length-adjusted {options.length_adjusted} must be at least 2 unprotected tokens")
    if options.length_adjusted is not None and options.by != "r":
        raise CommandError(f"--length-adjusted is for --by r; leave it out with --by {options.by}")
    if not options.pairs and (options.rejected != "redundant" or options.min_difference is not None):
        raise CommandError("--rejected and --min-difference are for pairs; give --pairs, too, or leave them out")
    if options.all_right and options.rejected == "wrong":
        raise CommandError("--rejected wrong needs wrong completions, and --all-right says that there are none; leave one out")
    if options.output != PIPE:
        sidecar = _sidecar(options.output)
        for path in dict.fromkeys((options.output, part_of(options.output), sidecar)):
            check_destination("--output", path, [options.scores], lambda _: _is_ours(sidecar), "entra select")


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


def _is_ours(sidecar: Path) -> bool:
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    return isinstance(content, dict) and content.get("written_by") == "entra select"


def _picked(group: list[Completion], options: argparse.Namespace) -> list[_Picked] | str:
    """What is kept of a prompt's completions, the best first, or its pairs, the largest difference first; else why not."""
    right = _ordered([one for one in group if one.right], options)
    if not right:
        return "no right completion"
    if not options.pairs:
        return [_Picked(one, None, group) for one in right[: options.per_prompt]]
    wrong = options.rejected == "wrong"
    others = _ordered([one for one in group if not one.right], options) if wrong else right[1:]
    if not others:
        return "no wrong completion" if wrong else "one right completion alone"
    measure = _MEASURES[options.by]
    least = options.min_difference
    if least is None:
        least = -math.inf if wrong else measure.least
    best = measure.redundancy(right[0])
    apart = [one for one in reversed(others) if round(measure.redundancy(one) - best, measure.digits) >= least]
    return [_Picked(right[0], one, group) for one in apart[: options.per_prompt]] or f"no difference of at least {least:g}"


def _ordered(completions: Sequence[Completion], options: argparse.Namespace) -> list[Completion]:
    """The best first."""
    measure = _MEASURES[options.by]
    return sorted(completions, key=lambda one: (measure.redundancy(one), one.tokens, one.row))


def _carried(options: argparse.Namespace, found: Input, picked: Sequence[_Picked]) -> tuple[list[str], list[str]]:
    """The columns of the input that the output has, and those that would mislead TRL."""
    if len({isinstance(one.best.prompt, str) for one in picked}) > 1:
        raise CommandError(
            "some prompts are text and some are messages, but TRL takes only one of the two in a file; select them apart"
        )
    names = list(dict.fromkeys(name for one in picked for name in one.best.columns))
    if options.pairs:
        of_one = {options.correct_column, *(found.prefix + name for name in SCORE_COLUMNS)}
        groups = [one.group for one in picked]
        names = [name for name in names if name not in of_one and all(_agree(group, name) for group in groups)]
    return [name for name in names if name not in _NOT_CARRIED], [name for name in names if name in _NOT_CARRIED]


def _agree(group: Sequence[Completion], name: str) -> bool:
    return len({key_of(one.columns.get(name)) for one in group}) == 1


def _row(picked: _Picked, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """A row of the output; all have the same columns."""
    best, rejected, group = picked
    others = {name: best.columns.get(name) for name in names}
    why = _why(best, group, options)
    if rejected is None:
        reasons = {"row": best.row, "value": best.value, "reason": why}
        texts = {"prompt": best.prompt, "completion": best.completion}
    else:
        reasons = {
            "chosen_row": best.row,
            "rejected_row": rejected.row,
            "chosen_value": best.value,
            "rejected_value": rejected.value,
            "reason": f"chosen: {why}; rejected: {_why(rejected, group, options)}",
        }
        texts = {"prompt": best.prompt, "chosen": best.completion, "rejected": rejected.completion}
    return {**texts, **others, **{OWN + name: value for name, value in reasons.items()}}


def _why(one: Completion, group: Sequence[Completion], options: argparse.Namespace) -> str:
    value = f"{options.by} {one.value:.4g}" + ("" if one.positions is None else f" at {one.positions} unprotected tokens")
    if not one.right:
        return f"{value}, wrong"
    right = _ordered([other for other in group if other.right], options)
    place = f"number {right.index(one) + 1} of {len(right)} right ones" if len(right) > 1 else "the only right one"
    return f"{value}, {place}"


def _number(count: int, things: str) -> str:
    return f"{count:,} {things if count != 1 else things.removesuffix('s')}"


def _listed(reasons: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f": {kinds}" if kinds else ""


def _averages(options: argparse.Namespace, prompts: Sequence[list[Completion]], picked: Sequence[_Picked]) -> list[str]:
    """What selecting changes."""

    def line(name: str, completions: Sequence[Completion]) -> str:
        tokens = f"tokens {statistics.fmean(one.tokens for one in completions):,.1f}"
        value = "" if options.by == "tokens" else f"{options.by} {statistics.fmean(one.value for one in completions):.4g}, "
        return f"  {name:<9} {value}{tokens} on average"

    best = [one.best for one in picked]
    rejected = [one.rejected for one in picked if one.rejected is not None]
    if rejected:
        return [line("chosen", best), line("rejected", rejected)]
    return [line("right", [one for group in prompts for one in group if one.right]), line("kept", best)]


def _write(path: Path, rows: Sequence[dict[str, Any]], record: Mapping[str, Any]) -> list[str]:
    """Write rows and record, and return what there is to say about it. The record comes first, because it alone says that the
    output may be replaced."""
    if path != PIPE:
        try:
            write_whole(_sidecar(path), json.dumps(record, indent=1, default=json_value) + "\n")
        except OSError as error:
            raise CommandError(f"cannot write --output {path}: {error.strerror or error}; choose another", 1) from error
    with Stream(path) as output:
        output.append(rows)
        mixed = output.finish()
    return [f"  note      columns without a common type hold JSON: {', '.join(mixed)}"] if mixed else []
