"""The reward and its parts on problems of four domains, in completions that the model writes itself.

The tasks are reasoning-gym's, and small enough that a small model gets some right. They stand for their domain because

- math: the answer is computed from given numbers (a sum, a greatest common divisor, an equation, a word problem);
- logic: the answer follows from premises alone (a syllogism, who lies, a puzzle of houses, propositions);
- code: a program, or rules that work like one, must be traced (Python, Brainf*ck, string rewriting, a function of lists);
- common sense: the answer needs knowledge that is not in the text. Examples are how relatives are called, how weeks and months
  run, how many legs animals have, which verbs mean to like.

A domain's prompts, answer formats and lengths differ as much as its reasoning. So a difference between domains is one between
these sets of tasks. r falls with the length by itself. So the experiment also reports its expectation over `--positions`
unprotected tokens drawn at random (rarefaction), for the completions that have as many.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch

from benchmarks.comparisons import resampled_ratio
from benchmarks.experiments import measuring
from benchmarks.experiments.drawing import COLOURS, dots
from benchmarks.experiments.results import Figure, Result, Table, with_interval
from benchmarks.experiments.token_kinds import kinds_of
from entra.config import ScoreConfig
from entra.encode import Encoder
from entra.forward import unwrapped
from entra.metrics import Interval, mean_interval, wilson_interval
from entra.policy import Policy
from entra.problems import load_problems, reasoning_gym_reward
from entra.progress import progress_bar

DOMAINS: dict[str, dict[str, dict[str, Any]]] = {
    "math": {
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "gcd": {"min_value": 4, "max_value": 30},
        "simple_equations": {"min_value": 1, "max_value": 10, "min_terms": 2, "max_terms": 2},
        "lcm": {"max_value": 20},
    },
    "logic": {
        "syllogism": {},
        "knights_knaves": {"n_people": 2},
        "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
        "propositional_logic": {},
    },
    "code": {
        "codeio": {"input_prediction_probability": 0.0},
        "bf": {},
        "string_manipulation": {"min_string_length": 5, "max_string_length": 8, "min_num_rules": 3, "max_num_rules": 3},
        "list_functions": {},
    },
    "common sense": {
        "family_relationships": {"min_family_size": 4, "max_family_size": 5},
        "calendar_arithmetic": {"tasks": ["weekday_offset", "is_leap_year", "weekday_of_date_from_first_date"]},
        "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 5},
        "needle_haystack": {"min_num_statements": 5, "max_num_statements": 10},
    },
}
ALL = "all"
_GROUPS = {
    "numbers": ("number",),
    "operators": ("operator",),
    "words": ("word", "connective", "reflection"),
    "punctuation": ("punctuation",),
}
_DRAWS = 12  # how many problems are drawn for each that is used; prompts that are too long are passed over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the experiment `domain`."""
    parser.add_argument("--model", default="smollm2", help='a folder, a hub name, or "smollm2" (default: %(default)s)')
    parser.add_argument("--problems", type=int, default=24, help="per domain, its tasks in turn (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per completion (default: %(default)s)")
    parser.add_argument("--max-prompt-tokens", type=int, default=500, help="longer ones are passed over (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=12, help="completions at once (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of sampling (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of sampling (default: %(default)s)")
    parser.add_argument("--positions", type=int, default=50, help="of the length-adjusted r (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of problems and sampling (default: %(default)s)")


def run(options: argparse.Namespace) -> Result:
    """Generates, scores, and counts; see the module.

    Raises:
        ValueError: no model, or flags outside their range.
        ImportError: reasoning-gym or datasets is missing.
    """
    if options.problems < 1 or options.batch_size < 1 or options.max_new_tokens < 2:
        raise ValueError(
            f"problems={options.problems}, batch_size={options.batch_size} must be at least 1, "
            f"max_new_tokens={options.max_new_tokens} at least 2"
        )
    config = ScoreConfig()
    adjusted_config = replace(config, length_adjusted=options.positions)
    policy = measuring.load_model(options)
    tokenizer: Any = policy.tokenizer
    with redirect_stdout(sys.stderr):  # reasoning-gym prints dots while it reads; stdout is for the tables
        chosen = problems(policy, options)
    completions = generated(policy.model, tokenizer, [problem["prompt_ids"] for problem in chosen], options)
    found = measuring.Samples(
        [
            measuring.Sample(problem=str(i), kind=problem["domain"], prompt=problem["prompt"], completion=ids)
            for i, (problem, ids) in enumerate(zip(chosen, completions, strict=True))
        ]
    )
    measured = measuring.measure(policy, found)
    scores = measuring.scored(measured.traces, config)
    adjusted = measuring.scored(measured.traces, adjusted_config).rewards
    rows = []
    for i, one in enumerate(measured.traces):
        problem, ids = chosen[int(one.sample.problem)], completions[int(one.sample.problem)]
        text = tokenizer.decode(one.token_ids, skip_special_tokens=True)
        own = scores[i]
        rows.append(
            {
                "domain": problem["domain"],
                "task": problem["task"],
                "correct": int(reasoning_gym_reward([text], entry=[problem["entry"]])[0] == 1.0),
                "finished": int(len(ids) > len(one.token_ids)),
                "tokens": len(one.token_ids),
                "r": own.reward,
                "r_adjusted": adjusted[i] if own.unprotected >= options.positions else None,
                "repeated": own.repeated_share,
                "logprob": float(one.logprobs.double().mean()),
                "mu": float(one.mean.double().mean()),
                "lift": float(one.lift.double().mean()),
                **_kinds(one.pieces, own.protected.tolist()),
            }
        )
    names = ("problems", "max_new_tokens", "max_prompt_tokens", "batch_size", "temperature", "top_p", "positions", "seed")
    settings = {"model": options.model, **{name: getattr(options, name) for name in names}, "tasks": DOMAINS}
    summary = {
        "by_domain": {domain: _summary(_of(rows, domain)) for domain in [*DOMAINS, ALL]},
        **measured.left_out.summary(),
        "examples": _examples(tokenizer, measured, rows),
    }
    return Result(name="domain", settings=settings, rows=rows, summary=summary)


def problems(policy: Policy, options: argparse.Namespace) -> list[dict[str, Any]]:
    """`options.problems` of each domain, its tasks in turn, with the domain and the prompt's ids. None is longer than allowed.

    Raises:
        ValueError: too few prompts are short enough.
    """
    encoder = Encoder(policy.tokenizer, unwrapped(policy.model), {})
    chat = getattr(policy.tokenizer, "chat_template", None) is not None
    chosen = []
    for domain, tasks in DOMAINS.items():
        share = -(-options.problems // len(tasks))
        by_task = []
        for task, task_options in tasks.items():
            rows = load_problems({task: task_options}, _DRAWS * share, seed=options.seed, chat=chat).to_list()
            short: list[dict[str, Any]] = []
            for row in rows:
                try:
                    ids = encoder.encode(row["prompt"], [0]).prompt
                except ValueError:  # longer than the model's context
                    continue
                if len(ids) <= options.max_prompt_tokens and len(short) < share:
                    short.append({**row, "domain": domain, "prompt_ids": ids})
            if len(short) < share:
                raise ValueError(
                    f"max_prompt_tokens={options.max_prompt_tokens} leaves {len(short)} of {len(rows)} problems of {task}, "
                    f"{share} are needed; allow longer prompts"
                )
            by_task.append(short)
        chosen += [row for turn in zip(*by_task, strict=True) for row in turn][: options.problems]
    return chosen


def generated(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], options: argparse.Namespace) -> list[list[int]]:
    """A sampled completion for each prompt. It ends with the EOS where there was one."""
    end = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of like length need few pads
    completions: list[list[int]] = [[] for _ in prompts]
    with progress_bar(len(prompts), 0, "generated") as bar, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(options.seed)
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[end] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=model.device)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=0,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=end,
            )
            for i, new in zip(batch, output[:, width:].tolist(), strict=True):
                completions[i] = new[: new.index(end) + 1] if end in new else new
            bar.update(len(batch))
    return completions


def _kinds(pieces: Sequence[str], protected: Sequence[bool]) -> dict[str, int]:
    """How many tokens of each group of kinds there are, and how many of them are protected."""
    kinds = [token.kind for token in kinds_of(pieces)]
    counts = {}
    for group, members in _GROUPS.items():
        counts[f"tokens_{group}"] = sum(kind in members for kind in kinds)
        counts[f"protected_{group}"] = sum(kind in members and kept for kind, kept in zip(kinds, protected, strict=True))
    return counts


def _of(rows: Sequence[dict[str, Any]], domain: str) -> list[dict[str, Any]]:
    return [row for row in rows if domain in (ALL, row["domain"])]


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals, shares of kinds among all and among protected tokens, and correlations."""
    measured = ("correct", "finished", "tokens", "r", "r_adjusted", "r_of_adjusted", "repeated", "logprob", "mu", "lift")
    rows = [{**row, "r_of_adjusted": None if row["r_adjusted"] is None else row["r"]} for row in rows]
    summary: dict[str, Any] = {"completions": len(rows), "adjusted": sum(row["r_adjusted"] is not None for row in rows)}
    for name in measured:
        values = [float(row[name]) for row in rows if row[name] is not None]
        if name in ("correct", "finished"):
            summary[name] = wilson_interval(statistics.fmean(values), len(values)) if values else None
        else:
            summary[name] = mean_interval(values) if len(values) > 1 else None
    for kind in ("tokens", "protected"):
        totals = [sum(row[f"{kind}_{group}"] for group in _GROUPS) for row in rows]
        summary[f"{kind}_share"] = {
            group: resampled_ratio([(row[f"{kind}_{group}"], total) for row, total in zip(rows, totals, strict=True)])
            for group in _GROUPS
        }
    summary["correlations"] = {
        f"{of} with {other}": _correlation([(row[of], row[other]) for row in rows])
        for of in ("r", "r_of_adjusted", "r_adjusted")
        for other in ("tokens", "correct")
    }
    return summary


def _correlation(pairs: Sequence[tuple[float | None, float]]) -> Interval | None:
    """Pearson's, with the 95 % interval of Fisher's z. None where one of the two does not vary, or for fewer than 5 pairs."""
    known = [(float(a), float(b)) for a, b in pairs if a is not None]
    value = _pearson(known) if len(known) >= 5 else math.nan
    if not math.isfinite(value) or abs(value) >= 1:
        return None
    half = statistics.NormalDist().inv_cdf(0.975) / math.sqrt(len(known) - 3)
    return Interval(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half))


def _pearson(pairs: Sequence[tuple[float, float]]) -> float:
    """NaN where one of the two does not vary."""
    if any(len({pair[side] for pair in pairs}) < 2 for side in (0, 1)):
        return math.nan
    return statistics.correlation(*zip(*pairs, strict=True))


def _examples(tokenizer: Any, measured: measuring.Measurement, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each domain the completion whose r is the median."""
    examples = {}
    for domain in DOMAINS:
        inside = sorted((i for i, row in enumerate(rows) if row["domain"] == domain), key=lambda i: rows[i]["r"])
        if inside:
            i = inside[len(inside) // 2]
            text = tokenizer.decode(measured.traces[i].token_ids, skip_special_tokens=True)
            examples[domain] = {"task": rows[i]["task"], "r": rows[i]["r"], "completion": text}
    return examples


def tables(result: Result) -> list[Table]:
    """What is measured in each domain, what is protected there, and what r correlates with."""
    settings, summary = result.settings, result.summary
    by_domain: dict[str, dict[str, Any]] = summary["by_domain"]
    positions = settings["positions"]

    def cell(domain: str, name: str, scale: float = 1, digits: int = 1) -> str:
        interval = by_domain[domain][name]
        return "" if interval is None else with_interval(interval, scale, digits)

    measured: list[tuple[str, Callable[[str], str]]] = [
        ("completions", lambda domain: f"{by_domain[domain]['completions']}"),
        ("right, %", lambda domain: cell(domain, "correct", 100, 0)),
        ("ended, %", lambda domain: cell(domain, "finished", 100, 0)),
        ("tokens", lambda domain: cell(domain, "tokens", digits=0)),
        ("r", lambda domain: cell(domain, "r", digits=3)),
        (
            f"r of {positions} tokens (of n completions)",
            lambda domain: f"{cell(domain, 'r_adjusted', digits=3)} ({by_domain[domain]['adjusted']})",
        ),
        ("r of the same n completions", lambda domain: cell(domain, "r_of_adjusted", digits=3)),
        ("repeated, % of unprotected", lambda domain: cell(domain, "repeated", 100)),
        ("mean log P, nats", lambda domain: cell(domain, "logprob", digits=2)),
        ("mean μ, 1/1000", lambda domain: cell(domain, "mu", 1000, 2)),
        ("mean lift", lambda domain: cell(domain, "lift", digits=2)),
    ]
    correlations = {
        "r with tokens": "r with tokens",
        "r_of_adjusted with tokens": "r with tokens, the same n completions",
        "r_adjusted with tokens": f"r of {positions} tokens with tokens",
        "r with correct": "r with right (1) or wrong (0)",
        "r_of_adjusted with correct": "r with right or wrong, the same n completions",
        "r_adjusted with correct": f"r of {positions} tokens with right or wrong",
    }

    def correlated(domain: str, name: str) -> str:
        interval = by_domain[domain]["correlations"][name]
        return "" if interval is None else with_interval(interval, digits=2)

    of = (
        f"{settings['problems']} problems per domain, one completion each by {settings['model']}, sampled at temperature "
        f"{settings['temperature']:g} (top-p {settings['top_p']:g}), cut at {settings['max_new_tokens']} tokens"
    )
    tasks = "; ".join(f"{domain}: {', '.join(names)}" for domain, names in settings["tasks"].items())
    shares = [
        [
            domain,
            *(
                with_interval(by_domain[domain][share][group], 100, 0)
                for group in _GROUPS
                for share in ("protected_share", "tokens_share")
            ),
        ]
        for domain in by_domain
    ]
    return [
        Table(
            caption=f"**The reward and its parts by domain.** {of}. Means with 95 % intervals: Wilson's for shares of "
            f"completions, else by the normal approximation. Tasks: {tasks}.{summary['left_out']}",
            header=["", *by_domain],
            rows=[[name, *(show(domain) for domain in by_domain)] for name, show in measured],
        ),
        Table(
            caption="**What is protected.** Share of a kind among the protected tokens and among all tokens, %. Intervals "
            f"resample completions. {of}. Words include connectives and words of reflection.",
            header=["domain", *(f"{group}, {share}" for group in _GROUPS for share in ("protected", "all"))],
            rows=shares,
        ),
        Table(
            caption="**What r goes along with.** Pearson correlations with 95 % intervals (Fisher's z) over the completions "
            f"of a domain. A cell is empty where one of the two does not vary. {of}.",
            header=["", *by_domain],
            rows=[[shown, *(correlated(domain, name) for domain in by_domain)] for name, shown in correlations.items()],
        ),
    ]


def figures(result: Result) -> list[Figure]:
    """r against length, and the means of r by domain."""
    settings = result.settings
    return [
        Figure(
            name="domain",
            title="The reward on problems of four domains",
            caption="Left: r against the length, one dot for each completion, filled where the answer is right. Right: means "
            f"of r and of the expected r of {settings['positions']} unprotected tokens, which does not depend on the length, "
            f"with 95 % intervals. {settings['problems']} problems per domain, one completion each by {settings['model']}, cut "
            f"at {settings['max_new_tokens']} tokens.",
            draw=lambda canvas: _draw(canvas, result),
            size=(11.0, 4.6),
        )
    ]


def _draw(canvas: Any, result: Result) -> None:
    scatter, means = canvas.subplots(1, 2, width_ratios=(1.4, 1))
    domains = list(DOMAINS)
    for i, domain in enumerate(domains):
        rows = _of(result.rows, domain)
        scatter.scatter(
            [row["tokens"] for row in rows],
            [row["r"] for row in rows],
            marker="osD^"[i % 4],
            s=28,
            edgecolors=COLOURS[i],
            facecolors=[COLOURS[i] if row["correct"] else "none" for row in rows],
            label=domain,
        )
    scatter.set(xlabel="tokens of the completion", ylabel="reward r", xlim=(0, None))
    legend = scatter.legend(loc="lower left")
    for handle, colour in zip(legend.legend_handles, COLOURS, strict=False):
        handle.set_facecolor(colour)
    positions = result.settings["positions"]
    by_domain = result.summary["by_domain"]
    names = {"r": "r", "r_adjusted": f"r of {positions} tokens"}
    dots(means, domains, {shown: [by_domain[domain][name] for domain in domains] for name, shown in names.items()})
    means.set_xlabel("reward, mean")
    means.legend(loc="best")
