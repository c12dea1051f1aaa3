"""Where a training goes on: the same command again continues from the last whole checkpoint of its output folder.

Beside the checkpoints stands `entra_train.json`, the settings that they were made with. Others are refused, since the trainer
would take half of the new ones (the reward) and half of the old (optimizer, schedule). Settings that only watch, place or end a
run may change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entra.cli import CommandError
from entra.cli.output import flat, json_value
from entra.whole_file import write_whole

_RECORD = "entra_train.json"
_STATE = "trainer_state.json"  # which the trainer writes last
_FREE = (
    *(
        "output_dir",
        "resume_from_checkpoint",
        "run_name",
        "project",
        "report_to",
        "trackio",
        "hub",
        "push_to_hub",
        "log",
        "save",
    ),
    *("eval", "do_", "num_completions_to_print", "disable_tqdm", "dataloader", "max_steps", "num_train_epochs", "local_rank"),
    *("ddp", "fsdp", "deepspeed", "use_cpu", "vllm_server", "vllm_group", "vllm_gpu", "verify"),
)
"""How the names of settings begin that may change."""


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps that was written to its end; a run that was killed while writing leaves half of one."""
    return next(filter(_is_whole, reversed(_checkpoints(folder))), None)


def passed_over(folder: Path) -> list[Path]:
    """The checkpoints after the last whole one: none of them was written to its end."""
    last = last_checkpoint(folder)
    return [path for path in _checkpoints(folder) if last is None or _steps(path) > _steps(last)]


def told(path: Path) -> str:
    """What there is to say about a checkpoint that is passed over."""
    return f"{path} was not written to its end (no {_STATE} that can be read) and is passed over"


def _checkpoints(folder: Path) -> list[Path]:
    """All that are there, whole or not, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_steps)


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_to_resume(folder: Path, wish: str | bool | None, settings: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, or None to begin.

    Args:
        folder: of the checkpoints.
        wish: `--resume_from_checkpoint`. None: the last one, if the settings are still the same. "true": the last one anyway.
            "false": begin; a folder with checkpoints is then refused. Anything else is the checkpoint's folder.
        settings: of this run.

    Raises:
        CommandError: no such checkpoint, or one that belongs to other settings.
    """
    last = last_checkpoint(folder)
    if isinstance(wish, str) and wish.lower() not in ("true", "false"):
        if not _is_whole(Path(wish)):
            raise CommandError(f"--resume_from_checkpoint {wish} is not a checkpoint: it has no {_STATE} that can be read")
        return Path(wish)
    wish = wish if wish is None or isinstance(wish, bool) else wish.lower() == "true"
    if last is None:
        if wish:
            raise CommandError(f"--resume_from_checkpoint true, but {folder} has no checkpoint; leave it out to begin")
        return None
    if wish is False:
        raise CommandError(
            f"{folder} has {last.name}, and a run from the start would mix its files with it; use another --output_dir"
        )
    if wish is None:
        _check(folder, last, settings)
    return last


def check_folder(folder: Path, model: str) -> None:
    """Refuse a folder in which the trained model would take the place of another.

    Args:
        folder: of the checkpoints.
        model: that is trained.

    Raises:
        CommandError: the model's own folder, or one with a model and without a record of a run.
    """
    if os.path.isdir(model) and folder.is_dir() and folder.samefile(model):
        raise CommandError(f"--output_dir {folder} is the model that is trained; choose another folder")
    ours = folder / _RECORD
    there = sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern))
    if ours.exists():
        try:
            written = json.loads(ours.read_text(encoding="utf-8")).keys() >= {"options", "config", "arguments"}
        except (OSError, ValueError, AttributeError, RecursionError):
            written = False
        there = [] if written else [ours]
    if there:
        raise CommandError(f"{there[0]} exists, and entra train did not write it; use another --output_dir, or remove it")


_MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.safetensors.index.json", "tokenizer*.json", "adapter_config.json")


def is_finished(checkpoint: Path, max_steps: int, epochs: float) -> bool:
    """Whether a whole checkpoint has all steps of a run of `max_steps` steps, or with max_steps <= 0 of so many epochs.

    The trainer would make one step more.
    """
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if max_steps <= 0:
        max_steps = state["max_steps"] if state["num_train_epochs"] >= epochs else state["global_step"] + 1
    return bool(state["global_step"] >= max_steps)


def record(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings of a run that begins."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _RECORD, json.dumps(settings, indent=1, default=json_value) + "\n")


def _check(folder: Path, last: Path, settings: Mapping[str, Any]) -> None:
    remedy = "use another --output_dir, or --resume_from_checkpoint true to go on all the same"
    try:
        then = dict(flat(json.loads((folder / _RECORD).read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise CommandError(f"{folder} has {last.name} but no {_RECORD} that says what it belongs to; {remedy}") from error
    now = dict(flat(json.loads(json.dumps(settings, default=json_value))))
    for name in {**then, **now}:
        if not name.rpartition(".")[2].startswith(_FREE) and then.get(name) != now.get(name):
            raise CommandError(
                f"{folder} has {last.name} of a run with {name}={then.get(name)!r}, now it is {now.get(name)!r}; {remedy}"
            )


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
