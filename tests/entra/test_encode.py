"""Text, chat messages and ids become the same ids, and what cannot be encoded says why."""

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, build
from tiny_tokenizer import build_tokenizer
from tokenizers import processors

from entra.encode import Encoder, completion_text


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encoder(tokenizer, model=None, **chat_template_kwargs):
    return Encoder(tokenizer, model, chat_template_kwargs)


def characters(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_prompt_takes_the_tokenizers_special_tokens_and_completion_does_not(tokenizer, model):
    row = encoder(tokenizer, model).encode("2+2=", "4.")
    assert row.prompt == [1, *characters(tokenizer, "2+2=")]
    assert row.completion == characters(tokenizer, "4.")


def test_chat_prompt_goes_through_the_template_and_assistant_text_does_not(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    row = encoder(tokenizer).encode(messages, [{"role": "assistant", "content": "<think>x</think> ok"}])
    assert tokenizer.decode(row.prompt) == "<s><user>hi<assistant>"
    assert tokenizer.decode(row.completion) == "<think>x</think> ok"


def test_chat_template_kwargs_reach_the_template(tokenizer):
    row = encoder(tokenizer, thinking=True).encode([{"role": "user", "content": "hi"}], "ok")
    assert tokenizer.decode(row.prompt) == "<s><user>hi<assistant>#"


def test_prompt_that_ends_in_an_assistant_message_is_continued(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "we"}]
    assert tokenizer.decode(encoder(tokenizer).encode(messages, "ll").prompt) == "<s><user>hi<assistant>we"


@pytest.mark.parametrize(
    "completion",
    ["4.", "4.</s>", "4.</s><pad><pad>", [{"role": "assistant", "content": "4."}], "ids", "ids and eos", "tensor"],
)
def test_every_form_of_a_completion_gives_the_same_ids(completion, tokenizer, model):
    ids = characters(tokenizer, "4.")
    given = {"ids": ids, "ids and eos": [*ids, 2, 0, 0], "tensor": torch.tensor([*ids, 2])}
    row = encoder(tokenizer, model).encode(
        [5], given.get(completion, completion) if isinstance(completion, str) else completion
    )
    assert row.completion == ids


def test_every_eos_of_the_generation_config_is_dropped(model, tokenizer):
    model.generation_config.eos_token_id = [2, 77]
    try:
        assert encoder(tokenizer, model).encode([5], [9, 77, 2, 77]).completion == [9]
    finally:
        model.generation_config.eos_token_id = 2


def test_eos_inside_a_completion_stays(tokenizer):
    assert encoder(tokenizer).encode([5], [9, 2, 9, 2]).completion == [9, 2, 9]


def test_completion_ids_win_over_the_text(tokenizer):
    assert encoder(tokenizer).encode([5], "something else", [8, 9]).completion == [8, 9]


def test_leading_pads_of_a_prompt_are_dropped(tokenizer):
    assert encoder(tokenizer).encode([0, 0, 7, 8], [9]).prompt == [7, 8]


def test_a_bos_that_is_also_the_pad_survives():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<s>"
    assert encoder(tokenizer).encode([1, 1, 1, 7], [9]).prompt == [1, 7]


def test_an_empty_prompt_is_the_bos(tokenizer):
    assert encoder(tokenizer).encode("", [9]).prompt == [1]
    assert encoder(tokenizer).encode([], [9]).prompt == [1]


def test_an_empty_prompt_without_a_bos_is_an_error():
    with pytest.raises(ValueError, match=r"prompt is empty and the tokenizer has no BOS.*at least one token"):
        encoder(build_tokenizer(bos=False)).encode("", [9])


@pytest.mark.parametrize(
    ("prompt", "completion", "error", "message"),
    [
        (3.5, "x", TypeError, r"prompt=3.5 must be text, a list of chat messages, or a list of token ids"),
        ("x", 3.5, TypeError, r"completion=3.5 must be text"),
        ("x", None, TypeError, r"completion=None must be text"),
        ("x", [{"role": "user", "content": "y"}], ValueError, r"role 'user'; only the assistant's"),
        ("x", [{"role": "assistant", "content": None}], TypeError, r"content is not text"),
        ([VOCABULARY], "x", ValueError, rf"the prompt holds token id {VOCABULARY}, outside .* 0 to {VOCABULARY - 1}"),
        ([5], [6, -1], ValueError, r"the completion holds token id -1"),
        ([5] * 4000, [6] * 97, ValueError, r"4097 tokens, but the model's context holds 4096"),
    ],
)
def test_what_cannot_be_encoded_says_why(prompt, completion, error, message, tokenizer, model):
    with pytest.raises(error, match=message):
        encoder(tokenizer, model).encode(prompt, completion)


def test_text_without_a_tokenizer_is_an_error(model):
    with pytest.raises(ValueError, match=r"tokenizer=None, but text must be tokenised; pass tokenizer="):
        encoder(None, model).encode("x", [6])


def test_messages_without_a_chat_template_are_an_error():
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer.chat_template or pass the prompt as text"):
        encoder(build_tokenizer(chat_template=None)).encode([{"role": "user", "content": "hi"}], "x")


def test_text_of_several_assistant_messages_is_joined():
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "ab"


def test_a_template_that_refuses_is_a_value_error():
    tokenizer = build_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"the chat template refuses prompt=.*roles must alternate"):
        encoder(tokenizer).encode([{"role": "user", "content": "hi"}], "x")


def test_ids_come_as_arrays_numpy_integers_and_tensors(tokenizer):
    ids = [7, 8, 9]
    for form in (np.array(ids), list(np.array(ids)), tuple(ids), torch.tensor(ids), [torch.tensor(i) for i in ids]):
        assert encoder(tokenizer).encode(form, form) == (ids, ids)
    for form in (np.array([7.0, 8.0]), [torch.tensor(7.0)], [True, False]):
        with pytest.raises(TypeError, match="must be text"):
            encoder(tokenizer).encode([5], form)


def test_messages_come_as_arrays_too(tokenizer):
    messages = np.array([{"role": "user", "content": "hi"}], dtype=object)
    row = encoder(tokenizer).encode(messages, np.array([{"role": "assistant", "content": "ok"}], dtype=object))
    assert tokenizer.decode(row.prompt) == "<s><user>hi<assistant>"
    assert tokenizer.decode(row.completion) == "ok"


def test_exactly_the_context_is_allowed(tokenizer, model):
    assert len(encoder(tokenizer, model).encode([5] * 4000, [6] * 96).completion) == 96


def test_negative_ids_are_an_error_without_a_model_too():
    with pytest.raises(ValueError, match=r"the completion holds token id -1, outside the model's vocabulary 0;"):
        encoder(None).encode([5], [-1])


def test_an_eos_that_the_tokenizer_appends_to_a_prompt_is_dropped():
    tokenizer = build_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert encoder(tokenizer).encode("hi", [9]).prompt == characters(build_tokenizer(), "hi")


def test_reasoning_beside_the_content_is_refused(tokenizer):
    with pytest.raises(ValueError, match="holds reasoning_content, which would go unscored"):
        encoder(tokenizer).encode([5], [{"role": "assistant", "content": "a", "reasoning_content": "b"}])
