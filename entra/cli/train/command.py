"""`entra train`: GRPO or RLOO with ENTRA rewards, from a YAML file or flags, as `trl grpo` does it.

Decisions taken here:

- Every option of TRL's ScriptArguments, GRPOConfig (or RLOOConfig), ModelConfig and DatasetMixtureConfig is a flag of the same
  name with the same meaning, parsed by TRL's own parser. Those of ScoreConfig, of the guards and of this command come beside
  them. Only one `chat_template_kwargs` is there, TRL's: prompts are scored as they are generated from.
- The same command again goes on from the last checkpoint, as with `entra score` (`entra.cli.train.checkpoints`).
- "smollm2" is written out as an ordinary model folder first: TRL loads the reference model a second time, by name.
- Without a GPU, `use_cpu` and float32 are the defaults; TRL's would stop with an error.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from entra.cli import CommandError, Parser, one_line, refuse, say
from entra.cli.train.checkpoints import (
    check_folder,
    checkpoint_to_resume,
    is_finished,
    last_checkpoint,
    passed_over,
    record,
    told,
)
from entra.cli.train.data import Problems, check_entries, load_data
from entra.cli.train.rewards import reward_functions
from entra.commands import ending_at_once
from entra.config import ScoreConfig, nearest_of
from entra.flags import add_flags
from entra.guards import Guards
from entra.problems import reasoning_gym_reward, unsafe_reasoning_gym_reward
from entra.rows import check_readable_again

RECIPES = Path(__file__).parents[2] / "recipes"

_USAGE = "entra train --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER [--config FILE] [OPTION ...]"
_DESCRIPTION = """\
Train with GRPO or RLOO and ENTRA rewards, scored by the policy itself. Options come from a YAML file (--config) and from flags,
which win. By default right answers are rewarded, and more so when they do not repeat themselves (reward functions: the gate and
"entra"). Checkpoints go to --output_dir every --save_steps. A run that was stopped, in whatever way, goes on from the last one
when you give the same command again. A command with other settings is refused. Several processes:
accelerate launch -m entra.cli train ..., or torchrun -m entra.cli train ..."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `entra train` takes beside the options of TRL and of ScoreConfig."""

    trainer: Literal["grpo", "rloo"] = "grpo"
    """The algorithm: EntraGRPOTrainer with the options of trl.GRPOConfig, or EntraRLOOTrainer with those of trl.RLOOConfig."""

    reward_funcs: list[str] | None = None
    """Reward functions: "entra" (with the guards below), "reasoning_gym" (checks the answer by the task's scorer), or
    "answer" (compares with the column `answer`, as entra eval does). TRL's are accuracy_reward, reasoning_accuracy_reward,
    think_format_reward and get_soft_overlong_punishment. Others by path: package.module.function. Default: the gate and
    entra."""

    gate: str | None = None
    """The reward function that "entra" is multiplied by, so that only right answers are paid for being concise: a name or path
    as above, or "none". Default: reasoning_gym for its problems, accuracy_reward for a dataset with a column `solution`, answer
    for one with a column `answer`."""

    verify_every: int = 0
    """Every n-th time, score one sequence by the pure-PyTorch reference too and log the deviation. 0: never."""

    verify_on_breach: Literal["raise", "warn"] = "raise"
    """What a deviation beyond the error budget does."""

    tasks: list[str] | dict[str, dict[str, Any]] | None = None
    """For --dataset_name reasoning_gym: the tasks. In YAML also a mapping of tasks to their options."""

    problems: int = 2000
    """For --dataset_name reasoning_gym: how many different problems to train on."""

    eval_problems: int = 100
    """For --dataset_name reasoning_gym: how many further ones to hold out, when --eval_strategy asks for evaluation."""

    problem_seed: int = 0
    """For --dataset_name reasoning_gym: another seed, other problems."""

    run_answers_as_code: bool = False
    """Train also on tasks of reasoning-gym whose scorers run the answer, text of the policy, as Python code: in a child process
    with limits that are no sandbox. Default: such tasks are refused."""


class _Run(NamedTuple):
    """A parsed command."""

    options: TrainOptions
    guards: Guards
    config: ScoreConfig
    script: Any
    arguments: Any
    model: Any
    mixture: Any

    def settings(self) -> dict[str, Any]:
        """All of it, as it is recorded."""
        return {
            "options": {**vars(self.options), **vars(self.guards)},
            "config": vars(self.config),
            "dataset": vars(self.script),
            "datasets": [vars(dataset) for dataset in self.mixture.datasets],
            "model": vars(self.model),
            "arguments": self.arguments.to_dict(),
        }


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `entra train` to the subparsers of the command line; TRL, which has its flags, is not loaded for that."""
    parser: argparse.ArgumentParser = commands.add_parser("train", add_help=False, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """`entra train` with the rest of the command line in `options.rest`.

    Raises:
        CommandError: what stops a run before it has begun, and Ctrl-C.
    """
    started = time.monotonic()
    missing = [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"training needs {', '.join(missing)}: pip install 'entra-reward[train]'")
    # Of transformers about TRL: nothing that a user of either could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    with ending_at_once():
        command = _parse(options.rest)
    arguments, settings = command.arguments, command.settings()
    folder = Path(arguments.output_dir)
    checkpoint = checkpoint_to_resume(folder, arguments.resume_from_checkpoint, settings)
    if checkpoint is None:
        check_folder(folder, command.model.model_name_or_path)
    if checkpoint is not None and is_finished(checkpoint, arguments.max_steps, arguments.num_train_epochs):
        say(f"{folder} is finished: all steps are done, the model is in {checkpoint}")
        return
    over = passed_over(folder)
    trainer = _trainer(command)
    if trainer.accelerator.is_main_process:
        say(*map(told, over))
        if checkpoint is None:
            record(folder, settings)
        else:
            say(f"going on from {checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        last = last_checkpoint(folder)
        remedy = f"the same command goes on from {last.name}" if last else "there is no checkpoint yet (--save_steps)"
        raise CommandError(f"interrupted after {trainer.state.global_step} steps; {remedy}", exit_code=130) from None
    trainer.save_model(arguments.output_dir)
    if trainer.accelerator.is_main_process:
        say(*_summary(trainer.state, folder, time.monotonic() - started))
    if arguments.push_to_hub:
        trainer.push_to_hub(dataset_name=command.script.dataset_name)
    _let_go(trainer)


_LETTING_GO = 0.2  # seconds


def _let_go(trainer: Any) -> None:
    """Ends the run's processes together, when nobody's last collective is in flight.

    A gloo thread needs the GIL to free the last gathered tensor. A process group that is freed before waits for the thread with
    the GIL held, for ever. This happened in 2 of 16 runs of two processes on a busy machine, torch 2.13.
    """
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        time.sleep(_LETTING_GO)
    trainer.accelerator.end_training()  # all that `Trainer.end` of newer transformers does


def _parse(words: Sequence[str]) -> _Run:
    """The command line and the YAML file that it names."""
    first = Parser(prog="entra train", usage=_USAGE, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--trainer")
    early, flags = first.parse_known_args(words)
    given: dict[str, Any] = {}
    if early.config is not None:
        path = _config_file(early.config)
        given = _yaml(path)
        flags += ["--config", str(path)]
    trainer = str(early.trainer or given.get("trainer", "grpo"))
    parser = _parser(trainer)
    with _told():
        script, arguments, model, mixture, own, from_file, from_flags = parser.parse_args_and_config(
            [*flags, "--trainer", trainer], return_remaining_strings=True, separate_remaining_strings=True
        )
        if from_flags:
            refuse(from_flags, parser)
        if from_file:
            name = from_file[0].removeprefix("--")
            known = [action.dest for action in parser._actions]
            raise CommandError(f"{path} has an unknown option {name!r}; {nearest_of(name, known)}")
        values = vars(own)
        options = TrainOptions(**{field.name: values[field.name] for field in fields(TrainOptions)})
        guards = Guards(**{field.name: values[field.name] for field in fields(Guards)})
        config = ScoreConfig(
            **{field.name: values[field.name] for field in fields(ScoreConfig) if field.name in values},
            chat_template_kwargs=arguments.chat_template_kwargs or {},
        )
    return _Run(options, guards, config, script, arguments, model, mixture)


def _parser(trainer: str) -> Any:
    """TRL's parser with all flags."""
    from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, RLOOConfig, ScriptArguments, TrlParser

    configs = {"grpo": GRPOConfig, "rloo": RLOOConfig}
    if trainer not in configs:
        raise CommandError(f"--trainer {trainer} must be one of {', '.join(configs)}")
    parser = type("_Parser", (Parser, TrlParser), {})(
        (ScriptArguments, configs[trainer], ModelConfig, DatasetMixtureConfig),
        prog="entra train",
        usage=_USAGE,
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options of entra train")
    group.add_argument("--config", metavar="FILE", help=f"YAML with any of these options, or one of {', '.join(_recipes())}")
    add_flags(group, TrainOptions, underscores=True)
    group = parser.add_argument_group('guards of "entra" (entra.EntraReward)')
    add_flags(group, Guards, underscores=True)
    group = parser.add_argument_group("options of the method (entra.ScoreConfig)")
    add_flags(group, ScoreConfig, leave_out=("chat_template_kwargs",), underscores=True)
    for action in parser._actions:
        if action.dest in ("output_dir", "model_name_or_path"):
            action.required = True
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True, bf16=False)
    return parser


def _recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _config_file(name: str) -> Path:
    """A file, or a recipe that comes with the package."""
    path = Path(name)
    if not path.is_file() and name in _recipes():  # a recipe's output folder has its name
        return RECIPES / f"{name}.yaml"
    return path


def _yaml(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    check_readable_again(path, "--config ")  # TRL reads it, too
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        recipes = ", ".join(_recipes())
        raise CommandError(f"cannot read --config {path}: {error.strerror}; name a file, or one of {recipes}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path} is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CommandError(f"--config {path} must be a mapping of options to values, such as beta: 0.04")
    return content


def _trainer(command: _Run) -> Any:
    """The trainer that a command describes."""
    import entra

    arguments, options = command.arguments, command.options
    with arguments.main_process_first(desc="making the model folder"):
        name = _model_folder(command.model.model_name_or_path, Path(arguments.output_dir))
    run_code = options.run_answers_as_code
    chat = _has_chat_template(name, command.model.model_revision, arguments.trust_remote_code)
    problems = Problems(options.tasks, options.problems, options.eval_problems, options.problem_seed, chat, run_code)
    data = load_data(command.script, command.mixture, problems, arguments.eval_strategy != "no")
    functions = reward_functions(
        options.reward_funcs, options.gate, data.columns, command.config, command.guards, run_answers_as_code=run_code
    )
    if any(getattr(f, "gate", f) in (reasoning_gym_reward, unsafe_reasoning_gym_reward) for f in functions):
        check_entries(data, run_code)
    with _told():
        from trl import get_peft_config, get_quantization_config

        arguments.model_init_kwargs = {
            "revision": command.model.model_revision,
            "trust_remote_code": arguments.trust_remote_code,
            "attn_implementation": command.model.attn_implementation,
            "dtype": command.model.dtype,
            **(arguments.model_init_kwargs or {}),
        }
        trainer: Any = {"grpo": entra.EntraGRPOTrainer, "rloo": entra.EntraRLOOTrainer}[options.trainer](
            model=name,
            reward_funcs=functions,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.test,
            quantization_config=get_quantization_config(command.model),
            peft_config=get_peft_config(command.model),
            verify_every=options.verify_every,
            verify_on_breach=options.verify_on_breach,
        )
    if any(weight.requires_grad and weight.dtype == torch.float16 for weight in trainer.model.parameters()):
        raise CommandError("the weights are float16, in which small updates vanish; use --dtype float32 or bfloat16")
    return trainer


def _model_folder(name: str, output: Path) -> str:
    """`name`, or for "smollm2" a folder in `output` with an ordinary model in it, written unless it is there."""
    if name != "smollm2":
        return name
    folder = output / name
    if not folder.exists():
        from entra.smollm2 import load_smollm2

        with _told():
            model, tokenizer = load_smollm2()
            unfinished = output / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            _ordinary(model).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
    return str(folder)


def _ordinary(model: Any) -> Any:
    """The same weights in a model that can be saved: transformers takes one from a GGUF file for quantized, and refuses."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    ordinary = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    ordinary.load_state_dict(model.state_dict())
    ordinary.generation_config = model.generation_config
    return ordinary


def _has_chat_template(model: str, revision: str, trust_remote_code: bool) -> bool:
    from transformers import AutoTokenizer

    with _told(f"cannot load --model_name_or_path {model}: "):
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    return tokenizer.chat_template is not None


@contextmanager
def _told(what: str = "") -> Iterator[None]:
    """Inside, what TRL, transformers and the configs refuse is a CommandError that begins with `what`."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise CommandError(what + one_line(error)) from error


def _summary(state: Any, folder: Path, seconds: float) -> list[str]:
    """The run in a few lines: what was logged first and last."""
    logged = [entry for entry in state.log_history if "reward" in entry]
    lines = [f"{folder}: {state.global_step:,} steps, model saved, {seconds:.0f} s"]
    if logged:
        names = [name for name in logged[-1] if name == "reward" or (name.startswith("rewards/") and name.endswith("/mean"))]
        for name in (*names, "completions/mean_length"):
            before, after = (entry.get(name) for entry in (logged[0], logged[-1]))  # None: no completion was scored
            lines.append(f"  {name:<36} {_number(before):>10} -> {_number(after)}")
    return lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
