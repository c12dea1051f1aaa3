"""Whether a completion of a public data set is right, by code alone: no model judges, and nothing in the data is run.

`correct_number` grades the GSM8K completions of MiP-Overthinking, whose files hold no grades. `correct_item` grades
thinking-traces by the rules of that repository's `src/thinktrace/grade.py` (MIT), written anew. No file there holds its grades,
only their sums: 183, 181, 187 and 136 of 200.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

Item = dict[str, Any]
"""An entry of `data/items.json` in thinking-traces: `grader`, `answer`, `accept`, and what its grader asks for."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
LABELLED = re.compile(r"\banswer[\s*]*[:\-][\s*]*(.*?)[\s*]*$", re.IGNORECASE)
FENCED = re.compile(r"\s*```[a-zA-Z0-9]*\s*\n(.*?)\n\s*```\s*", re.DOTALL)
LONGEST_SHORT_REPLY = 12
"""Up to so many words, a reply counts as right if it holds the answer among others."""


def correct_number(completion: str, answer: str) -> bool:
    r"""Whether the last number in the last `\boxed{...}`, or in the completion where nothing is boxed, equals `answer`.

    Commas between digits do not count, and neither does the `\!` that some models write behind them.
    """
    box = last_boxed(completion)
    numbers = NUMBER.findall((completion if box is None else box).replace("\\!", ""))
    return bool(numbers) and _value(numbers[-1]) == _value(answer)


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, up to the brace that closes it or the end of the text; None without one."""
    _, found, rest = text.rpartition("\\boxed{")
    if not found:
        return None
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return rest


def correct_item(item: Item, reply: str) -> bool:
    """Whether a reply without its thinking is right; an empty one is not.

    An item that asks for a form (`grader` "constraint") is held to all of the reply. The others are held to the last line
    that says "Answer: ...", or to the last line where none does.

    Raises:
        ValueError: for a grader or check that is not known.
    """
    reply = reply.strip()
    fenced = FENCED.fullmatch(reply)
    reply = fenced[1].strip() if fenced else reply
    if not reply:
        return False
    if item["grader"] == "constraint":
        return _has_form(item["check"], item["params"], reply)
    stated = _stated(reply)
    accepted = [_plain(answer) for answer in (item["answer"], *item["accept"])]
    match item["grader"]:
        case "numeric":
            number = _number(stated)
            return _plain(stated) in accepted[1:] or (number is not None and number == _number(item["answer"]))
        case "text":
            short = len(_plain(stated).split()) <= LONGEST_SHORT_REPLY
            return any(_plain(stated) == answer or (short and _names(stated, answer)) for answer in accepted if answer)
        case "choice":
            options = item["options"].items()
            named = [key for key, names in options if any(_names(stated, _plain(name)) for name in names)]
            return named == [item["answer"]]
        case grader:
            raise ValueError(f"grader={grader!r} is none of numeric, text, choice and constraint")


def _stated(reply: str) -> str:
    lines = [line.rstrip() for line in reply.splitlines() if line.strip()]
    labelled = [found[1] for line in lines if (found := LABELLED.search(line)) and found[1]]
    return labelled[-1] if labelled else lines[-1].strip()


def _plain(text: str) -> str:
    """Lower-case letters, digits and apostrophes with one space between words, without accents and a leading "the"."""
    decomposed = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in decomposed if not unicodedata.combining(letter)).lower().replace("\u2019", "'")
    return " ".join(re.sub(r"[^a-z0-9']+", " ", letters).split()).removeprefix("the ")


def _names(reply: str, plain_phrase: str) -> bool:
    return f" {plain_phrase} " in f" {_plain(reply)} "


def _number(text: str) -> float | None:
    """The first number in digits, else the first word where it is the name of one."""
    found = NUMBER.search(text)
    if found:
        return _value(found[0])
    word = _plain(text).partition(" ")[0]
    return float(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else None


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _has_form(check: str, params: Item, reply: str) -> bool:
    words = [word for word in reply.split() if re.search("[A-Za-z0-9]", word)]
    match check:
        case "word_count":
            return len(words) == params["n"]
        case "repeat_word":
            return reply.rstrip(".").lower() == " ".join([params["word"]] * params["n"]).lower()
        case "upper_csv":
            parts = [part.strip() for part in reply.rstrip(".").split(",")]
            return len(parts) == params["n"] and all(part.isalpha() and part.isupper() for part in parts)
        case "json_keys":
            try:
                pairs = json.loads(reply, object_pairs_hook=list)
            except (ValueError, RecursionError):
                return False
            return bool(pairs == [(key, 1) for key in params["keys"]])
        case "exact_chars":
            return bool(reply == params["char"] * params["n"])
        case "desc_range":
            return reply.rstrip(".").replace(" ", "") == ",".join(map(str, range(params["hi"], params["lo"] - 1, -1)))
        case "start_end":
            ends = [re.sub("[^a-z0-9']", "", word.lower()) for word in (words[0], words[-1])] if len(words) > 1 else []
            return ends == [params["start"].lower(), params["end"].lower()]
        case "forbidden_letter":
            return len(words) >= params["min_words"] and params["letter"].lower() not in reply.lower()
    raise ValueError(f"check={check!r} is not known")
