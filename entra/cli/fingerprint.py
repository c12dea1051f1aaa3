"""What a model is, told by its files: config, tokenizer and weights, so that scores of two models never stand in one file.

Decisions taken here:

- Every file that transformers may read from the model's folder counts, and the whole of it. A change of a setting, a normaliser
  or a few weights leaves sizes, names and most values as they were. So do weights that an index names in folders below, code of
  another repository that the config names, and of an adapter the model that it belongs to.
- A file in the hub's cache is a link to a blob that is named by its hash, which is taken; other files are hashed. Hashes of
  large ones are remembered with size, times and inode, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from entra.cli import CommandError
from entra.progress import progress_bar
from entra.source import SIDECAR
from entra.whole_file import write_whole

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")
# What trainers leave beside a model, and says nothing about it.
_NOT_THE_MODEL = (
    *("training_args.bin", "trainer_state.json", "entra_train.json", "optimizer.", "scheduler.", "rng_state"),
    *("all_results", "train_results", "eval_results"),
)
_LARGE = 2**22
"""Bytes from which on a hash is remembered."""
_REMEMBERED = 1000
_SETTLED = 2.0
"""Seconds after which a file that changes has other times than before."""


def fingerprint(model: str, revision: str | None = None, quiet: bool = False) -> dict[str, str]:
    """The hash of each file of a model that is on this machine, by name.

    Args:
        model: a folder, a hub name whose files are in the cache, or "smollm2".
        revision: of a hub name.
        quiet: no progress bar.

    Raises:
        CommandError: its files cannot be found or read.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    name: str | None = model
    try:
        while name is not None and name not in seen:
            seen.add(name)
            folder = _folder(name, revision=revision if name == model else None)
            prefix = "" if name == model else f"{name}: "
            files = sorted({*_files(folder), *_weights_of_indices(folder)})
            found.update(
                zip((prefix + path.relative_to(folder).as_posix() for path in files), _hashes(files, quiet), strict=True)
            )
            for repository, elsewhere in _code_elsewhere(folder).items():
                files = sorted(elsewhere.glob("*.py"))
                found.update(zip((f"{repository}: {path.name}" for path in files), _hashes(files, quiet), strict=True))
            name = _base_of_adapter(folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the files of --model {name}, which tell one model from another: {error}") from error
    return found


def _folder(model: str, known_by: Sequence[str] = ("config.json", "adapter_config.json"), revision: str | None = None) -> Path:
    if model == "smollm2":
        from entra.smollm2 import find_smollm2

        return find_smollm2()
    if os.path.isdir(model):
        return Path(model)
    from transformers.utils import cached_file

    for name in known_by:
        with suppress(OSError):
            found = cached_file(model, name, local_files_only=True, revision=revision)
            if found is not None:
                return Path(found).parent
    raise FileNotFoundError(f"the hub's cache has no {' or '.join(known_by)} of {model}")


def _files(folder: Path) -> Iterator[Path]:
    for inside in (folder, folder / "additional_chat_templates"):
        for path in inside.iterdir() if inside.is_dir() else ():
            named = path.suffix in _SUFFIXES and not path.name.startswith(_NOT_THE_MODEL)
            if named and not path.name.endswith(SIDECAR) and path.is_file():
                yield path


def _weights_of_indices(folder: Path) -> Iterator[Path]:
    """Weights that an index names, which may lie in folders below."""
    for index in folder.glob("*.index.json"):
        files = _content(index).get("weight_map")
        for name in set(files.values()) if isinstance(files, dict) else ():
            if isinstance(name, str) and (folder / name).is_file():
                yield folder / name


def _code_elsewhere(folder: Path) -> dict[str, Path]:
    """The folders of other repositories whose code this model or its tokenizer names, as far as it is on this machine."""
    found: dict[str, Path] = {}
    for name in ("config.json", "tokenizer_config.json"):
        classes = _content(folder / name).get("auto_map")
        for value in classes.values() if isinstance(classes, dict) else ():
            for reference in value if isinstance(value, list) else [value]:
                repository, elsewhere, code = str(reference).partition("--")
                if elsewhere:
                    with suppress(FileNotFoundError):  # never loaded, so never run
                        found[repository] = _folder(repository, [f"{code.partition('.')[0]}.py"])
    return found


def _base_of_adapter(folder: Path) -> str | None:
    name = _content(folder / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _content(path: Path) -> dict[str, Any]:
    """Of a JSON file; nothing where there is none, or where it holds something else."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _hashes(files: Sequence[Path], quiet: bool) -> list[str]:
    remembered = _remembered()
    known = [_blob(path) or remembered.get(_key(path)) for path in files]
    missing = [path for path, hashed in zip(files, known, strict=True) if hashed is None]
    total = sum(path.stat().st_size for path in missing)
    new: dict[str, str] = {}
    if total < _LARGE:
        made = [_hash(path, None) for path in missing]
    else:
        with progress_bar(-(-total // 2**20), 0, "MiB hashed", quiet) as bar:
            made = [_hash(path, bar) for path in missing]
    for path, (key, hashed) in zip(missing, made, strict=True):
        status = path.stat()
        # One that has just been written could change again within the resolution of its times.
        if status.st_size >= _LARGE and time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED and key == _key(path):
            new[key] = hashed
    if new:
        _remember({**remembered, **new})
    rest = iter(made)
    return [hashed if hashed is not None else next(rest)[1] for hashed in known]


def _hash(path: Path, bar: Any) -> tuple[str, str]:
    key, digest = _key(path), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            if bar is not None:
                bar.update(1)
    return key, digest.hexdigest()


def _blob(path: Path) -> str | None:
    """The name of the hub's blob that a link leads to, which is the content's hash."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    hashed = target.parent.name == "blobs" and len(target.name) in (40, 64) and set(target.name) <= set("0123456789abcdef")
    return target.name if hashed else None


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} {status.st_dev}"


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entra" / "hashes.json"


def _remembered() -> dict[str, str]:
    try:
        content = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home, or nested too deeply
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, str) and len(value) == 64}


def _remember(hashes: dict[str, str]) -> None:
    with suppress(OSError, RuntimeError):  # without a memory they are made again
        path = _memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dict(list(hashes.items())[-_REMEMBERED:]), indent=0) + "\n")
