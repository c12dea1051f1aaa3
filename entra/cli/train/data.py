"""The dataset of `entra train`: by hub name, folder, file, mixture, or problems of reasoning-gym."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from entra.cli import CommandError, one_line
from entra.rows import check_readable_again
from entra.scorer_process import ProcessError

_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PROBLEMS = "reasoning_gym"
"""The name of the dataset of problems that are made on the spot."""


class Data(NamedTuple):
    """What is trained on, and what is evaluated on when that is asked for."""

    train: Any
    test: Any | None
    columns: list[str] | None
    """Of the training split; None where a stream does not know them."""


class Problems(NamedTuple):
    """Which problems of reasoning-gym to make."""

    tasks: Sequence[str] | Mapping[str, Mapping[str, Any]] | None
    train: int
    test: int
    seed: int
    chat: bool
    """Whether the model takes chat messages."""
    run_answers_as_code: bool = False
    """Whether tasks are taken whose scorers do."""


def load_data(script: Any, mixture: Any, problems: Problems, evaluate: bool) -> Data:
    """The dataset that TRL's ScriptArguments (`script`) or DatasetMixtureConfig (`mixture`) name.

    Raises:
        CommandError: it cannot be read, lacks a split, or has no column `prompt`.
    """
    if script.dataset_name == PROBLEMS and not mixture.datasets:
        splits: Any = _problems(problems, evaluate)
        names = ("train", "test")
    elif problems.tasks:
        raise CommandError(f"--tasks are of the dataset {PROBLEMS}; give --dataset_name {PROBLEMS}, or leave them out")
    else:
        splits = _splits(script, mixture)
        names = (script.dataset_train_split, script.dataset_test_split)
    for name, option in zip(names[: 1 + evaluate], ("--dataset_train_split", "--dataset_test_split"), strict=False):
        if name not in splits:
            raise CommandError(f"the dataset has no split {name!r}; it has {', '.join(map(str, splits))}: use {option}")
    train = splits[names[0]]
    columns = train.column_names
    if columns is not None and "prompt" not in columns:
        raise CommandError(f"the dataset has no column 'prompt', only {', '.join(columns)}; rename one of them")
    return Data(train, splits[names[1]] if evaluate else None, columns)


def check_entries(data: Data, run_answers_as_code: bool) -> None:
    """Refuse problems of reasoning-gym that can only be scored by running text as code, before anything is trained.

    Of a stream nothing is known yet: there `reasoning_gym_reward` refuses them one by one.

    Raises:
        CommandError: the first such problem, or what is no problem of reasoning-gym.
    """
    from entra.problems import check_task

    for split in (data.train, data.test):
        if split is None or not hasattr(split, "num_rows") or "entry" not in split.column_names:
            continue
        tasks = set()
        for number, entry in enumerate(split["entry"], start=1):
            try:
                tasks.add(json.loads(entry)["metadata"]["source_dataset"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CommandError(
                    f"row {number} of the dataset: entry is no problem of reasoning-gym ({one_line(error)}); "
                    "name another --gate"
                ) from error
        try:
            for task in tasks:
                check_task(task, run_answers_as_code=run_answers_as_code)
        except (ImportError, ValueError) as error:
            raise CommandError(one_line(error)) from error


def _problems(problems: Problems, evaluate: bool) -> dict[str, Any]:
    from entra.problems import load_problems

    if not problems.tasks:
        raise CommandError("which problems? name tasks of reasoning-gym, for example: --tasks chain_sum leg_counting")
    if problems.train < 1 or problems.test < 1:
        raise CommandError(f"--problems {problems.train} and --eval_problems {problems.test} must be at least 1")
    held_out = problems.test if evaluate else 0
    try:
        both = load_problems(
            problems.tasks,
            problems.train + held_out,
            seed=problems.seed,
            chat=problems.chat,
            run_answers_as_code=problems.run_answers_as_code,
        )
    except (ImportError, ValueError, ProcessError) as error:
        raise CommandError(one_line(error)) from error
    if not evaluate:
        return {"train": both}
    # The tasks take turns, so the last rows hold all of them.
    return {"train": both.select(range(problems.train)), "test": both.select(range(problems.train, len(both)))}


def _splits(script: Any, mixture: Any) -> Any:
    import datasets
    from trl import get_dataset

    name = script.dataset_name
    if not name and not mixture.datasets:
        raise CommandError(
            f"no dataset; give --dataset_name with a hub name, a folder, a file (*{', *'.join(_FILES)}) or {PROBLEMS}"
        )
    try:
        if mixture.datasets:
            return get_dataset(mixture)
        kind = _FILES.get(Path(name).suffix.lower())
        if kind is None:
            return datasets.load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
        check_readable_again(Path(name), "the dataset ")
        with open(name, "rb"):  # datasets' own error about a missing file names a pattern
            pass
        return datasets.load_dataset(kind, data_files=glob.escape(name), streaming=script.dataset_streaming)
    except OSError as error:
        raise CommandError(f"cannot read the dataset {name}: {error.strerror or one_line(error)}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise CommandError(f"cannot read the dataset {name or 'mixture'}: {one_line(cause)}") from error
