"""The presses of docs/kv-eviction.md beside kvpress' own, and its table of calls. `make test-kvpress` runs this."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool1d

import entra_kernels

kvpress = pytest.importorskip("kvpress")
from kvpress.presses.finch_press import FinchPress  # noqa: E402
from kvpress.presses.kvzip_press import KVzipPress  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/kv-eviction.md").read_text()
PRESSES, USE, _ = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CALLS = dict(re.findall(r"^\| ([\w-]+) \| `(incoming_attention\(.*?\))` \|", PAGE, re.MULTILINE))
TOKENS, BUDGET = 300, 1e-6

ours: dict = {}
exec(compile(PRESSES, "docs/kv-eviction.md", "exec"), ours)


def build(family: str, attention: str) -> torch.nn.Module:
    config = AutoConfig.for_model(
        family,
        vocab_size=101,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        initializer_range=0.2,  # with the usual 0.02 attention is close to uniform, and a wrong score close to a right one
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def prefill(press, family="llama", attention="sdpa", ids=None):
    """The cache of a prompt under a press."""
    ids = torch.randint(3, 101, (2, TOKENS), generator=torch.Generator().manual_seed(1)) if ids is None else ids
    model = build(family, attention)
    with torch.no_grad(), press(model):
        return model(ids, use_cache=True).past_key_values


class Seen(kvpress.ScorerPress):
    """Calls `look` with what a press gets, in each layer."""

    def __init__(self, look):
        super().__init__(compression_ratio=0.1)
        self.look, self.layers = look, 0

    def score(self, *given):
        self.layers += 1
        self.look(*given)
        return given[2][..., 0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("name", "own", "attention"),
    [
        ("ObservedAttention", kvpress.ObservedAttentionPress, "eager"),
        ("SnapKV", kvpress.SnapKVPress, "eager"),
        ("SnapKV", kvpress.SnapKVPress, "sdpa"),
    ],
)
def test_scores_are_those_of_kvpress(name, own, attention, family):
    def look(*given):
        expected = own(compression_ratio=0.5).score(*given)
        assert expected.std() > 1e-3
        module, hidden_states, keys, values, _, kwargs = given
        got = ours[name](compression_ratio=0.5).score(module, hidden_states, keys, values, None, kwargs)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=BUDGET)

    seen = Seen(look)
    prefill(seen, family, attention)
    assert seen.layers == 2


@pytest.mark.parametrize(
    ("name", "own", "attention"), [("ObservedAttention", "ObservedAttentionPress", "eager"), ("SnapKV", "SnapKVPress", "sdpa")]
)
def test_they_keep_the_same_keys_without_eager_attention(name, own, attention):
    expected = prefill(getattr(kvpress, own)(compression_ratio=0.5), attention=attention)
    got = prefill(ours[name](compression_ratio=0.5))
    for mine, its in zip(got.layers, expected.layers, strict=True):
        assert mine.keys.shape[2] == TOKENS // 2
        torch.testing.assert_close(mine.keys, its.keys, rtol=0, atol=1e-5)


def test_the_page_shows_how_to_use_them():
    given = {**ours, "torch": torch, "model": build("llama", "sdpa"), "input_ids": torch.arange(1, 101)[None]}
    exec(compile(USE, "docs/kv-eviction.md", "exec"), given)
    assert [layer.keys.shape[2] for layer in given["cache"].layers] == [50, 50]


def call(method, **given):
    return eval(CALLS[method], {"torch": torch, **vars(entra_kernels), **given})


def check(look):
    seen = Seen(look)
    prefill(seen)
    assert seen.layers == 2


def inputs(module, hidden_states, keys, kwargs):
    return {"q": ours["queries"](module, hidden_states, kwargs["position_embeddings"]), "k": keys, "N": TOKENS, "w": 64}


def test_every_method_of_the_table_has_a_test():
    assert set(CALLS) == {"TOVA", "FastV", "PyramidKV", "Finch", "KVzip", "Compactor", "R-KV"}


@pytest.mark.parametrize("method", ["TOVA", "FastV"])
def test_the_last_query(method):
    def look(module, hidden_states, keys, values, attentions, kwargs):
        expected = kvpress.TOVAPress().score(module, hidden_states, keys, values, None, kwargs)
        got = call(method, **inputs(module, hidden_states, keys, kwargs))
        for head in range(keys.shape[1]):
            torch.testing.assert_close(got[..., :-1], expected[:, head, :-1], rtol=0, atol=BUDGET)

    check(look)


def test_pyramidkv():
    def look(module, hidden_states, keys, values, attentions, kwargs):
        expected = kvpress.PyramidKVPress().score(module, hidden_states, keys, values, None, kwargs)
        got = call("PyramidKV", **inputs(module, hidden_states, keys, kwargs))
        got = avg_pool1d(got[..., :-64], 5, stride=1, padding=2)
        torch.testing.assert_close(got, expected[..., :-64], rtol=0, atol=BUDGET)

    check(look)


def test_finch():
    def look(module, hidden_states, keys, values, attentions, kwargs):
        press = FinchPress()
        press.window_size = 64
        expected = press.score(module, hidden_states, keys, values, None, kwargs)
        given = inputs(module, hidden_states, keys, kwargs)
        got = torch.cat([call("Finch", **{**given, "q": q[None], "k": k[None]}) for q, k in zip(given["q"], keys, strict=True)])
        # The budget grows with the weights, up to the number of tokens.
        torch.testing.assert_close(got[..., :-64], expected[..., :-64], rtol=0, atol=BUDGET * TOKENS)

    check(look)


def test_kvzip():
    """Its replay pass: behind a prompt the context comes again, and asks for the sinks, a chunk of the context, and itself."""

    def look(module, hidden_states, keys, values, attentions, kwargs):
        press = KVzipPress(compression_ratio=0.5)
        press.start_idx, press.end_idx, queries = 50, 150, 120
        press.score_val = torch.zeros(2, 2, 2, TOKENS)
        press.context_length = TOKENS - queries
        last = {"position_embeddings": [part[:, -queries:] for part in kwargs["position_embeddings"]]}
        weights = press._compute_cross_attention(module, hidden_states[:, -queries:], keys, last)
        expected = weights[..., press.n_sink : press.n_sink + 100].amax(dim=(-3, -2))
        q = ours["queries"](module, hidden_states[:, -queries:], last["position_embeddings"])
        k = torch.cat([keys[:, :, : press.n_sink], keys[:, :, 50:150], keys[:, :, -queries:]], dim=2)
        got = call("KVzip", q=q, k=k).unflatten(1, (2, -1)).amax(2)[..., press.n_sink : press.n_sink + 100]
        torch.testing.assert_close(got, expected, rtol=0, atol=BUDGET)

    check(look)


def test_compactor():
    """kvpress' own scores of full chunks; its last chunk, if it is not full, attends to the padding too."""

    def look(module, hidden_states, keys, values, attentions, kwargs):
        expected = kvpress.NonCausalAttnPress(chunk_size=100).score(module, hidden_states, keys, values, None, kwargs)
        q = ours["queries"](module, hidden_states, kwargs["position_embeddings"])
        sums = torch.stack(
            [call("Compactor", q=q[b].transpose(0, 1), k=keys[b].transpose(0, 1), N=TOKENS, c=100) for b in range(len(q))]
        )
        got = avg_pool1d(sums * values.norm(dim=-1), 3, stride=1, padding=1)
        got = (got - got.mean()) / got.std()
        # Sums over a hundred queries, and dots that are not scaled down: both make rounding larger.
        torch.testing.assert_close(got, expected, rtol=0, atol=100 * BUDGET)

    check(look)


def test_rkv():
    """R-KV is no press: its formula is a softmax over the keys before the window."""

    def look(module, hidden_states, keys, values, attentions, kwargs):
        given = inputs(module, hidden_states, keys, kwargs)
        k = keys[:, :, :-8].repeat_interleave(2, dim=1)
        expected = (given["q"][:, :, -8:] @ k.mT * 20**-0.5).softmax(-1).mean(-2)
        torch.testing.assert_close(call("R-KV", **given), expected, rtol=0, atol=BUDGET)

    check(look)
