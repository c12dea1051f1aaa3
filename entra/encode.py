"""From prompts and completions, in whatever form they come, to token ids.

Decisions taken here:

- Prompt and completion are tokenised separately, so that the completion's ids are the same whatever precedes it.
- A chat prompt goes through the chat template; the assistant's text never does, because templates of reasoning models drop
  `<think>` blocks. It is tokenised verbatim, without special tokens.
- Trailing EOS and pads are dropped from completions, leading pads from prompts: text and ids then give the same number.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple


class EncodedRow(NamedTuple):
    """One sequence as token ids: `prompt` at least one id, `completion` without pads and trailing EOS, maybe empty."""

    prompt: list[int]
    completion: list[int]

    def ranked(self, scope: str) -> list[int]:
        """The tokens that compete for protection: the completion's, or all that have a log P; none without a completion."""
        if not self.completion or scope == "completion":
            return self.completion
        return (self.prompt + self.completion)[1:]


class Encoder:
    """Turns one prompt and one completion into an `EncodedRow`.

    Args:
        tokenizer: needed for text and chat messages, not for ids.
        model: its generation config names further EOS ids. Its config names the vocabulary, the context and BOS. May be None.
        chat_template_kwargs: further arguments of `apply_chat_template`.
    """

    def __init__(self, tokenizer: Any | None, model: Any | None, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._chat_template_kwargs = chat_template_kwargs
        config = _text_config(model)
        generation = getattr(model, "generation_config", None)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        sources = (tokenizer, generation, config)
        self.eos_ids = frozenset(i for source in sources for i in _ids(getattr(source, "eos_token_id", None)))
        self._pad_ids = frozenset(i for source in (tokenizer, generation) for i in _ids(getattr(source, "pad_token_id", None)))
        self._bos_id = next((i for source in sources for i in _ids(getattr(source, "bos_token_id", None))), None)

    def encode(self, prompt: Any, completion: Any, completion_ids: Any | None = None) -> EncodedRow:
        """Token ids of one row.

        Args:
            prompt: text, chat messages (a list of dicts with role and content), or token ids.
            completion: likewise. Chat messages must all be the assistant's.
            completion_ids: taken instead of `completion`, as they are but without pads and trailing EOS.

        Raises:
            TypeError: neither text nor messages nor ids.
            ValueError: text without a tokenizer, messages without a chat template, an empty prompt without a BOS id, ids
                outside the vocabulary, or more tokens than the model's context.
        """
        ids = self._prompt_ids(prompt)
        self._check_vocabulary("prompt", ids)
        row = EncodedRow(ids, self.encode_completion(completion if completion_ids is None else completion_ids))
        tokens = len(row.prompt) + len(row.completion)
        if self.context is not None and tokens > self.context:
            raise ValueError(
                f"prompt and completion have {tokens} tokens, but the model's context holds {self.context}; "
                "shorten the row or score with a model of longer context"
            )
        return row

    def encode_completion(self, completion: Any) -> list[int]:
        """Token ids of a completion without pads and trailing EOS; raises as `encode` does."""
        ids = as_ids(completion)
        if ids is None:
            text = completion_text(completion)
            ids = list(self._tokenizer_for("text")(text, add_special_tokens=False)["input_ids"])
        ids = self.trimmed(ids)
        self._check_vocabulary("completion", ids)
        return ids

    def has_ended(self, ids: Sequence[int]) -> bool:
        """Whether a completion's ids end in EOS, pads apart.

        Raises:
            ValueError: neither tokenizer nor model names an EOS id.
        """
        if not self.eos_ids:
            raise ValueError(
                "neither the tokenizer nor the model names an EOS id, so nothing tells which completions have ended; "
                "set tokenizer.eos_token"
            )
        kept = [int(i) for i in ids if int(i) in self.eos_ids or int(i) not in self._pad_ids]
        return bool(kept) and kept[-1] in self.eos_ids

    def _check_vocabulary(self, name: str, ids: Sequence[int]) -> None:
        wrong = next((i for i in ids if i < 0 or (self.vocab_size is not None and i >= self.vocab_size)), None)
        if wrong is not None:
            last = "" if self.vocab_size is None else f" to {self.vocab_size - 1}"
            raise ValueError(
                f"the {name} holds token id {wrong}, outside the model's vocabulary 0{last}; "
                "tokenizer and model do not belong together"
            )

    def trimmed(self, ids: Sequence[int]) -> list[int]:
        """`ids` without trailing EOS and pads."""
        end = len(ids)
        while end and (ids[end - 1] in self.eos_ids or ids[end - 1] in self._pad_ids):
            end -= 1
        return list(ids[:end])

    def _prompt_ids(self, prompt: Any) -> list[int]:
        ids = as_ids(prompt)
        if ids is not None:
            first = 0
            while first < len(ids) and ids[first] in self._pad_ids:
                first += 1
            if first and ids[first - 1] == self._bos_id:
                first -= 1  # the pad is also the BOS: the last of the run is the real one
            ids = ids[first:]
        elif isinstance(prompt, str):
            ids = list(self._tokenizer_for("text")(prompt)["input_ids"])
            if ids and ids[-1] in self.eos_ids and not prompt.endswith(self._tokenizer_for("text").eos_token or "\0"):
                ids.pop()  # some tokenizers end every text with EOS; the completion continues this one
        elif _is_chat(prompt):
            ids = self._chat_ids(_as_list(prompt))
        else:
            raise TypeError(f"prompt={short(prompt)} must be text, a list of chat messages, or a list of token ids")
        if not ids:
            if self._bos_id is None:
                raise ValueError(
                    "the prompt is empty and the tokenizer has no BOS id to stand for it. The first completion token then has "
                    "no probability; pass a prompt of at least one token"
                )
            ids = [self._bos_id]
        return ids

    def _chat_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._tokenizer_for("chat messages")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"prompt={short(messages)} holds chat messages but the tokenizer has no chat template; "
                "set tokenizer.chat_template or pass the prompt as text"
            )
        continued = messages[-1].get("role") == "assistant"
        try:
            ids = tokenizer.apply_chat_template(
                list(messages),
                tokenize=True,
                return_dict=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                **self._chat_template_kwargs,
            )
        except Exception as error:  # a template is a program: it raises what it likes, such as jinja2's TemplateError
            raise ValueError(f"the chat template refuses prompt={short(messages)}: {error}; change the messages") from error
        return list(ids)

    def _tokenizer_for(self, what: str) -> Any:
        if self._tokenizer is None:
            raise ValueError(f"tokenizer=None, but {what} must be tokenised; pass tokenizer=..., or token ids")
        return self._tokenizer


class RowChecker:
    """Encodes rows one by one, and says of a bad one what is wrong. So its error does not depend on its neighbours.

    Args:
        tokenizer, model, chat_template_kwargs: as for `Encoder`.
    """

    def __init__(self, tokenizer: Any | None, model: Any | None, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._encoder = Encoder(tokenizer, model, chat_template_kwargs)
        self._unlimited = Encoder(tokenizer, model, chat_template_kwargs)
        self._unlimited.vocab_size = self._unlimited.context = None

    def encode(self, prompt: Any, completion: Any) -> EncodedRow | str:
        """Token ids of one row, or "kind: message"."""
        try:
            encoded = self._encoder.encode(prompt, completion)
        except TypeError as error:
            return f"not text: {error}"
        except ValueError as error:
            return f"{self._limit(prompt, completion)}: {error}"
        return encoded if encoded.completion else "empty completion: it has no tokens but EOS and pads"

    def _limit(self, prompt: Any, completion: Any) -> str:
        """Which of the model's limits a row breaks, or that it has no token ids at all."""
        try:
            encoded = self._unlimited.encode(prompt, completion)
        except ValueError:
            return "cannot be tokenised"
        size = self._encoder.vocab_size
        inside = size is None or all(0 <= i < size for ids in encoded for i in ids)
        return "longer than the context" if inside else "outside the vocabulary"


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or the contents of its assistant messages.

    Raises:
        TypeError: neither text nor messages with text.
        ValueError: a message that is not the assistant's.
    """
    if isinstance(completion, str):
        return completion
    if not _is_chat(completion):
        raise TypeError(f"completion={short(completion)} must be text, a list of assistant messages, or a list of token ids")
    for message in completion:
        if message.get("role") != "assistant":
            raise ValueError(
                f"completion={short(completion)} holds a message of role {message.get('role')!r}; only the assistant's can be "
                "scored: pass completion_ids for tool-using rollouts"
            )
        if message.get("reasoning_content"):
            raise ValueError(
                f"completion={short(completion)} holds reasoning_content, which would go unscored; put the reasoning into "
                "content as the model wrote it, or pass completion_ids"
            )
        if not isinstance(message.get("content"), str):
            raise TypeError(f"completion={short(completion)} holds a message whose content is not text")
    return "".join(message["content"] for message in completion)


def as_ids(value: Any) -> list[int] | None:
    """A list of ints when `value` is one, or a 1-D integer tensor or array; an empty list counts as ids; else None."""
    value = _as_list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    if any(isinstance(i, bool) or not hasattr(i, "__index__") for i in value):
        return None
    try:
        return [operator.index(i) for i in value]
    except TypeError:  # floating-point tensors have an __index__ that refuses
        return None


def prompt_value(prompt: Any) -> Hashable:
    """A key that is equal for equal prompts. Lists, tuples, arrays and tensors of the same ids are equal. Messages are equal
    when they have the same keys and contents, in whatever order the keys stand."""
    prompt = _as_list(prompt)
    if isinstance(prompt, str | bytes):
        return prompt
    if isinstance(prompt, Mapping):
        return frozenset((key, prompt_value(value)) for key, value in prompt.items())
    if isinstance(prompt, Sequence):
        return tuple(map(prompt_value, prompt))
    return prompt if isinstance(prompt, Hashable) else repr(prompt)


def _as_list(value: Any) -> Any:
    """Arrays and tensors as lists: what pandas and datasets make of ids and messages in a Parquet file."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_chat(value: Any) -> bool:
    value = _as_list(value)
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message and "content" in message for message in value)
    )


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(i) for i in value] if isinstance(value, list | tuple) else [int(value)]


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def short(value: Any) -> str:
    """`value` as an error message shows it. (The one of `entra_kernels` brings torch, which reading a file does without.)"""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
