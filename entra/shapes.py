"""What of a row is the prompt and what the completion: the one place that decides it, for all commands.

| what people have | prompt | completion |
|---|---|---|
| plain columns | `prompt`, `problem`, `question`, `instruction` | `completion`, `generation(s)`, `response`, `output` |
| Alpaca | `instruction`, and `input` below it where there is one | `output` |
| OpenR1 | `problem` | `generations`; `messages` beside them repeats one of them |
| OpenAI messages, ShareGPT | what comes before in `messages`, `conversations` | the assistant's last messages there |
| OpenAI batch output | the request of the same `custom_id`, in another file | the choices in `response` |
| lm-evaluation-harness samples | the first of `arguments` | `resps` |

Decisions taken here:

- The columns of a file decide, not its rows. Where two columns could be the prompt, or the completion, nobody guesses. A
  column `prompt` is what the model was given, and goes before the other names, from which it was made.
- A list of completions becomes one row each, with its place in the column `generation_index`.
- Servers split what a reasoning model wrote into `reasoning_content` (or `reasoning`) and `content`. The completion is both
  again, as the model wrote them: `<think>\\n` reasoning `\\n</think>\\n\\n` content. Without content, the model was cut off
  while it thought, and the tag stays open.
- A batch's column `error` becomes the row's error. Where it is null, it is not carried.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from entra.commands import CommandError
from entra.rows import Row

PROMPTS = ("prompt", "problem", "question", "instruction")
COMPLETIONS = ("completion", "generation", "generations", "response", "output")
CHATS = ("messages", "conversations")
"""Columns that hold prompt and completion in one list of messages."""
ARGUMENTS, RESPONSES = "arguments", ("resps", "filtered_resps")
"""Of lm-evaluation-harness: what was asked, and what came back."""
REQUEST = "custom_id"
"""Names the request that a row of a batch's output answers."""
INDEX = "generation_index"
"""The column that says which of a row's completions this is, from 0."""
ANSWERS = (*COMPLETIONS, *CHATS, *RESPONSES)
"""Columns that are looked at for completions when no flag names one."""

_OF_EACH = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete", "finish_reasons")
"""Columns of OpenR1 that hold one value for each of its generations."""
_TEXTS = [name for name in COMPLETIONS if name != "generations"]
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's names for them."""


class Taken(NamedTuple):
    """The columns that were taken for prompt and completion: equal where one list of messages holds both."""

    prompt: str | None
    completion: str | None
    """None where nothing tells, and it need not."""

    def __str__(self) -> str:
        if self.prompt == REQUEST:
            return f"prompt: the request of the same {REQUEST}; completion: the choices in the column {self.completion}"
        if self.prompt == self.completion:
            return f"completion: the assistant's last messages in the column {self.completion}; prompt: what comes before them"
        return f"prompt: the column {self.prompt}; completion: the column {self.completion}"


class _FaultError(Exception):
    """The message is "kind: what is wrong"."""


def take(
    columns: Collection[str], prompt: str | None = None, completion: str | None = None, *, where: str = "the input"
) -> Taken:
    """Which columns are prompt and completion.

    Args:
        columns: of the file. Without any, all rows are bad.
        prompt: of `--prompt-column`, if it was given.
        completion: of `--completion-column`, if it was given.
        where: names the file in messages.

    Raises:
        CommandError: no column is known to hold one of them, or several are, or a flag names none.
    """
    for option, name in (("--prompt-column", prompt), ("--completion-column", completion)):
        if name is not None and columns and name not in columns:
            raise CommandError(f"no row has a column {name!r}; there are {', '.join(columns)}: use {option}")
    found = _pairs(columns, prompt, completion)
    if len(found) == 1:
        return found[0]
    if not columns:
        return Taken(prompt or PROMPTS[0], completion or COMPLETIONS[0])
    for option, what, names in (
        ("--completion-column", "completion", list(dict.fromkeys(pair.completion for pair in found))),
        ("--prompt-column", "prompt", list(dict.fromkeys(pair.prompt for pair in found))),
    ):
        if len(names) > 1:
            raise CommandError(f"{where}: the columns {' and '.join(map(str, names))} could both hold the {what}: use {option}")
    lacking = "prompt" if completion or any(name in columns for name in COMPLETIONS) else "completion"
    raise CommandError(
        f"{where}: no column is known to hold the {lacking}; there are {', '.join(columns)}: use --{lacking}-column"
    )


def take_if_any(columns: Collection[str], prompt: str | None, completion: str | None) -> tuple[Taken, str | None]:
    """The same where a file may lack one of them: None for what cannot be told, and why. A flag still must name a column."""
    try:
        return take(columns, prompt, completion), None
    except CommandError as error:
        if any(name is not None and name not in columns for name in (prompt, completion)):
            raise
        prompts = [prompt] if prompt else _prompts(columns)
        completions = [completion] if completion else [name for name in COMPLETIONS if name in columns]
        return Taken(prompts[0] if len(prompts) == 1 else None, completions[0] if len(completions) == 1 else None), str(error)


def _pairs(columns: Collection[str], prompt: str | None, completion: str | None) -> list[Taken]:
    """All that could be prompt and completion."""
    if prompt is not None and completion is not None:
        return [Taken(prompt, completion)]
    if completion in CHATS:
        return [Taken(completion, completion)]
    prompts = [prompt] if prompt else [name for name in _prompts(columns) if name != completion]
    completions = [completion] if completion else [name for name in COMPLETIONS if name in columns and name != prompt]
    found: list[Taken] = []
    if prompt in (None, ARGUMENTS) and completion in (None, *RESPONSES) and ARGUMENTS in columns:
        answers = [completion or RESPONSES[0]]
        found += [Taken(ARGUMENTS, name) for name in answers if name in columns]
    if not found or completion is None:
        found += [Taken(asked, answered) for asked in prompts for answered in completions]
    if prompt is None and not prompts and completion in (None, "response") and {REQUEST, "response"} <= set(columns):
        found.append(Taken(REQUEST, "response"))
    if prompt is None and completion is None and not any(pair.completion == "generations" for pair in found):
        found += [Taken(name, name) for name in CHATS if name in columns]
    return found


def _prompts(columns: Collection[str]) -> list[str]:
    return [PROMPTS[0]] if PROMPTS[0] in columns else [name for name in PROMPTS if name in columns]


def is_request(columns: Collection[str]) -> bool:
    """Whether these are the columns of the requests of a batch."""
    return {REQUEST, "body"} <= set(columns) and "response" not in columns


def prompt_of_request(columns: Mapping[str, Any]) -> Any:
    """What a request of a batch asks: chat messages, or text; None where it says neither."""
    body = columns.get("body")
    return (body.get("messages") or body.get("prompt")) if isinstance(body, Mapping) else None


def from_table(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row of CSV, where lists and objects can stand only as JSON. Those of other formats are parsed."""
    read = dict(columns)
    for name in (*CHATS, "generations", ARGUMENTS, *RESPONSES, *_OF_EACH, *PROMPTS, *COMPLETIONS):
        value = read.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            with suppress(ValueError, RecursionError):
                found = json.loads(value)
                # What can be text is text, but for messages and the response of a batch.
                if name not in (*PROMPTS, *_TEXTS) or _is_messages(found) or _choices(found) is not None:
                    read[name] = found
    return read


def columns_of(columns: Sequence[str], taken: Taken, requests: Mapping[str, Any] | None) -> list[str]:
    """The columns that rows have once prompt and completion were taken out of these `columns`."""
    if taken.prompt != REQUEST:
        return list(columns)
    kept = [name for name in columns if name != "error"]
    return kept if requests is None else [*kept, "prompt"]


def count(value: Any) -> int:
    """How many rows a row becomes if its completion column holds `value`."""
    several = _several(value)
    return 1 if several is None else max(1, len(several))


def rows_of(row: Row, taken: Taken, why: str | None = None, requests: Mapping[str, Any] | None = None) -> Iterator[Row]:
    """The rows that a row of a file becomes: itself with prompt and completion, once for each of its completions.

    Args:
        row: as it stands in the file.
        taken: for its file.
        why: nothing was taken for prompt or completion.
        requests: the prompts of a batch, by custom_id.
    """
    if row.malformed is not None:
        yield row
        return
    prompt, fault = None, None
    carried = dict(row.columns)
    try:
        prompt = _prompt(row.columns, taken, requests)
        if taken.prompt == REQUEST and prompt is not None:
            carried.setdefault("prompt", prompt)
    except _FaultError as error:
        fault = str(error)
    if taken.prompt == REQUEST:
        failed = carried.pop("error", None)
        if failed is not None:
            said = failed.get("message") if isinstance(failed, Mapping) else None
            fault = f"failed request: {said or failed}"
    if taken.prompt == taken.completion and taken.completion is not None:
        try:
            prompt, completion = _parted(_field(row.columns, taken.completion), taken.completion)
        except _FaultError as error:
            yield Row(carried, fault=str(error))
            return
        yield Row(carried, None, prompt, completion)
        return
    if taken.completion is None:
        yield Row(carried, None, prompt, fault=f"missing field: {why}")
        return
    value = row.columns.get(taken.completion)
    several = _several(value)
    if several is None or not several:
        yield _row(carried, taken, prompt, value, fault)
        return
    for index, one in enumerate(several):
        own = {**carried, **_each(carried, index, len(several)), taken.completion: _alone(value, one)}
        if len(several) > 1 or INDEX not in own:  # where it is, the row was made of one before
            own[INDEX] = index
        yield _row(own, taken, prompt, one, fault)


def _row(columns: dict[str, Any], taken: Taken, prompt: Any, value: Any, fault: str | None) -> Row:
    """A row with its completion, also where something is wrong with its prompt: some commands need none."""
    reason = value.get("finish_reason") if isinstance(value, Mapping) else None
    if reason is not None:
        columns.setdefault("finish_reason", reason)
    try:
        if value is None:
            _field(columns, str(taken.completion))
        if _choices(value) == []:
            raise _FaultError(f"missing field: {taken.completion} has no choices")
        if taken.completion in RESPONSES and not isinstance(value, str):
            raise _FaultError(f"not text: {taken.completion} holds no generated text; tasks of multiple choice have none")
        return Row(columns, None, prompt, _completion(value), fault)
    except _FaultError as error:
        return Row(columns, None, prompt, None, fault or str(error))


def _field(columns: Mapping[str, Any], name: str) -> Any:
    value = columns.get(name)
    if value is None:
        raise _FaultError(f"missing field: {name} is {'null' if name in columns else 'not there'}")
    return value


def _prompt(columns: Mapping[str, Any], taken: Taken, requests: Mapping[str, Any] | None) -> Any:
    if taken.prompt is None or taken.prompt == taken.completion:
        return None
    value = _field(columns, taken.prompt)
    if taken.prompt == REQUEST:
        if requests is None:
            raise _FaultError(
                f"missing field: the prompt is in the file of the batch's requests; name it, too, after that of the output. "
                f"Or name a column with --prompt-column. This is {REQUEST} {value}"
            )
        prompt = requests.get(str(value))
        if prompt is None:
            raise _FaultError(f"missing field: no request has {REQUEST} {value}, or it has neither messages nor prompt")
        return _chat(prompt)
    if taken.prompt == ARGUMENTS:
        return _argument(value)
    if taken.prompt == "instruction" and isinstance(value, str):
        more = columns.get("input")
        return f"{value}\n\n{more}" if isinstance(more, str) and more.strip() else value
    return _chat(value)


def _argument(value: Any) -> Any:
    """The prompt in `arguments`, which is {"gen_args_0": {"arg_0": prompt, ...}}, in older versions [[prompt, ...]]."""
    if isinstance(value, Mapping):
        first = next(iter(value.values()), None)
        first = first.get("arg_0") if isinstance(first, Mapping) else first
    else:
        first = value[0] if isinstance(value, list) and value else None
        first = first[0] if isinstance(first, list) and first else first
    if isinstance(first, list) and len(first) == 1 and isinstance(first[0], str):  # chat messages, written as JSON
        try:
            first = json.loads(first[0])
        except (ValueError, RecursionError):
            first = first[0]
    if first is None:
        raise _FaultError(f"missing field: {ARGUMENTS} holds no prompt")
    return _chat(first)


def _several(value: Any) -> list[Any] | None:
    """The completions in a column that holds a list of them; None where it holds one."""
    value = value.tolist() if hasattr(value, "tolist") else value
    choices = _choices(value)
    if choices is not None:
        return choices
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(one, str) for one in value):
        return value
    if len(value) == 1 and isinstance(value[0], list) and value[0] and all(isinstance(one, str) for one in value[0]):
        return list(value[0])  # resps, which has a list for each request of a sample
    if all(isinstance(one, list) and _is_messages(one) for one in value):
        return value
    return None


def _choices(value: Any) -> list[Any] | None:
    """The choices in the response of a batch; None where it is none."""
    if not isinstance(value, Mapping) or "body" not in value:
        return None
    body = value["body"]
    choices = body.get("choices") if isinstance(body, Mapping) else None
    return choices if isinstance(choices, list) else []


def _alone(value: Any, one: Any) -> Any:
    """A completion column that holds one of its completions: a batch's response keeps its form."""
    if isinstance(value, Mapping):
        return {**value, "body": {**value["body"], "choices": [one]}}
    return one


def _each(columns: Mapping[str, Any], index: int, number: int) -> dict[str, Any]:
    values = {name: columns.get(name) for name in _OF_EACH}
    return {name: value[index] for name, value in values.items() if isinstance(value, list) and len(value) == number}


def _parted(value: Any, name: str) -> tuple[Any, Any]:
    """A conversation as what comes before the assistant's last messages, and these."""
    messages = _chat(value)
    if not isinstance(messages, list) or not _is_messages(messages):
        raise _FaultError(f"not text: {name} must be a list of messages with role and content, or from and value")
    cut = len(messages)
    while cut and messages[cut - 1].get("role") == "assistant":
        cut -= 1
    if cut == len(messages):
        last = messages[-1].get("role")
        raise _FaultError(f"missing field: {name} ends with a message of role {last!r}, so there is no completion")
    return messages[:cut], _completion(messages[cut:])


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, Mapping) and "role" in m for m in value)


def _chat(value: Any) -> Any:
    """Messages of ShareGPT as those of OpenAI, content in parts as one text; everything else as it is."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        return value
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if "from" in message and "value" in message and "role" not in message:
        role = _ROLES.get(str(message["from"]).lower())
        if role is None:
            raise _FaultError(f"not text: a message is from {message['from']!r}; known are {', '.join(_ROLES)}")
        return {"role": role, "content": message["value"]}
    parts = message.get("content")
    if isinstance(parts, list) and parts and all(isinstance(part, Mapping) for part in parts):
        texts = [part.get("text") for part in parts]
        if all(isinstance(text, str) for text in texts):
            return {**message, "content": "".join(map(str, texts))}
    return message


def _completion(value: Any) -> Any:
    """A completion as `entra.encode` takes it: reasoning beside the content is put before it."""
    if isinstance(value, Mapping) and ("message" in value or "text" in value):  # a choice of a batch
        value = value["message"] if "message" in value else value["text"]
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    value = _chat(value)
    return [_with_reasoning(message) for message in value] if _is_messages(value) else value


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    name = next((name for name in ("reasoning_content", "reasoning") if name in message), None)
    reasoning = None if name is None else message[name]
    if not isinstance(reasoning, str) or not reasoning.strip():
        return {key: value for key, value in message.items() if key not in ("reasoning_content", "reasoning")}
    content = message.get("content") or ""
    closing = f"\n</think>\n\n{content.lstrip()}" if isinstance(content, str) and content.strip() else ""
    return {"role": message["role"], "content": f"<think>\n{reasoning.strip()}{closing}"}
