"""A tokenizer of one token per printable ASCII character, which fits the vocabulary of the tiny models."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% if thinking %}{{ '#' }}{% endif %}{% endif %}"
)


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE, bos: bool = True) -> PreTrainedTokenizerFast:
    """ids 0 to 4 are `SPECIAL`, then the printable characters; adds `<s>` in front of text unless `bos` is False."""
    printable = string.printable[:96]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=chat_template,
    )
