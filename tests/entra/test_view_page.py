"""The HTML page, in a real browser: what it shows against the traces that it was made from."""

import itertools
import math
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from shown_traces import scores_of

from entra.config import ScoreConfig
from entra.view.marked import Mark
from entra.view.page import write_page
from entra.view.trace import Trace

BROWSER = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
HOSTILE = "<script>window.hacked=1</script></script><!--<img src=x onerror='window.hacked=1'>\"'&lt;\u2028\x00]]>"
SHADES = [f"s{shade}" for shade in range(7)]


def trace_of(name, ids, *, seed=0, prompt="What?", words=None, **fields):
    """A trace with random scores; the text of token i is words[i], or " wi"."""
    rng = np.random.default_rng(seed)
    n = len(ids)
    logprobs, incoming = -rng.exponential(1.0, n), rng.exponential(0.01, n)
    importance = logprobs + 2 * incoming
    protected = np.zeros(n, dtype=bool)
    protected[np.argsort(-importance, kind="stable")[: n // 5]] = True
    values = {
        "logprobs": logprobs.tolist(),
        "incoming": incoming.tolist(),
        "importance": importance.tolist(),
        "protected": protected.tolist(),
    }
    scores = scores_of(list(ids), **{key: fields.pop(key, values.get(key)) for key in values}, reward=fields.pop("reward", 0.5))
    pieces = fields.pop("pieces", [words[i] if words else f" w{i}" for i in ids])
    return Trace(name=name, prompt=prompt, pieces=pieces, scores=scores, **fields)


def some_traces():
    """Two of one prompt, one of another, one that could not be scored, one without a reward."""
    rng = np.random.default_rng(5)
    return [
        trace_of(
            "beta", rng.integers(0, 30, 300).tolist(), seed=1, prompt="first prompt", reward=0.61, columns={"kind": "long"}
        ),
        trace_of(
            "alpha", rng.integers(0, 90, 120).tolist(), seed=2, prompt="first prompt", reward=0.83, columns={"kind": "short"}
        ),
        trace_of("gamma", [500, *range(40)], seed=3, prompt="second Prompt", reward=0.71, columns={"kind": "short"}),
        Trace(name="delta", prompt="third", error="empty completion: it has no tokens", columns={"kind": "long"}),
        trace_of("none", [1, 2, 3, 1], prompt="fourth", reward=None, logprobs=[-1.0, math.nan, -math.inf, -2.0]),
    ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if None in BROWSER.values():
        pytest.skip("needs a browser: apt-get update && apt-get install -y chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER["chromium"]
    flags = (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking disable-component-update "
        "disable-sync no-first-run window-size=1400,1000"
    )
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(BROWSER["chromedriver"]))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


class Page:
    """A page that is open, and what tests ask of it."""

    def __init__(self, driver, path):
        self.driver, self.path = driver, path
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.prefers("light")
        self.load()

    def load(self, fragment=""):
        self.driver.get("about:blank")
        self.driver.get(self.path.as_uri() + fragment)
        if fragment:
            self.wait("!document.getElementById('trace').hidden")

    def js(self, script, *arguments):
        return self.driver.execute_script(f"return ({script})", *arguments)

    def wait(self, condition, seconds=10.0):
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, f"not in {seconds} s: {condition}"
            time.sleep(0.01)

    def keys(self, *keys):
        """To whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def hover(self, element):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def prefers(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def width(self, pixels, scale=1):
        metrics = {"width": pixels, "height": 800, "deviceScaleFactor": scale, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def names(self):
        """Of the list, as it is sorted."""
        return self.js("[...document.querySelectorAll('.row .title')].map(e => e.textContent)")

    def text(self, pane=0):
        """The code units of the shown completion."""
        script = (
            "[...[...document.querySelectorAll('.text')[arguments[0]].querySelectorAll('.t')]"
            ".map(e => e.textContent).join('')].flatMap(c => [...Array(c.length).keys()].map(i => c.charCodeAt(i)))"
        )
        return self.js(script, pane)

    def box(self, element):
        """Its top and bottom in the window, and the window's height."""
        return self.js(f"(r => [r.top, r.bottom, innerHeight])({element}.getBoundingClientRect())")

    def token(self, at):
        return self.js("document.querySelectorAll('.text .t')[arguments[0]]", at)

    def card(self):
        """The numbers of the token that is looked at, by name, and its other lines."""
        return self.js(
            "Object.fromEntries([...[...document.querySelectorAll('#card dl > div')].map(e => [...e.children].map("
            "c => c.textContent)), "
            "...['token', 'where', 'state'].map(n => [n, document.querySelector('#card .' + n).textContent])])"
        )

    def assert_quiet(self):
        """Nothing was logged, nothing was fetched."""
        assert self.driver.get_log("browser") == []
        assert self.js("performance.getEntriesByType('resource').map(e => e.name)") == []


@pytest.fixture
def open_page(browser, tmp_path):
    def opened(traces, title="traces.jsonl", config=None, facts=None):
        path = tmp_path / "report.html"
        write_page(traces, path, title=title, config=config or ScoreConfig(), facts=facts or {"model": "tiny"})
        browser.get_log("browser")
        return Page(browser, path)

    return opened


@pytest.fixture(scope="module")
def traces():
    return some_traces()


@pytest.fixture
def page(open_page, traces):
    return open_page(traces)


def shown_numbers(trace, at, counted="incoming attention"):
    return {
        "log-prob": f"{trace.logprobs[at]:.3f} nats".replace("-", MINUS),
        counted: f"{trace.incoming[at]:.6f}",
        "importance": f"{trace.importance[at]:.3f} nats".replace("-", MINUS),
        "among the low-importance ones": f"{trace.scores.counts[trace.token_ids[at]]} of {trace.scores.unprotected}",
    }


# The list


def test_heading_and_summary_say_what_was_scored_and_how(open_page, traces):
    config = ScoreConfig(attention_weight=1e-4, protect_fraction=0.3, attention_statistic="lift", reward_ngram=3)
    page = open_page(traces, title="runs & co", config=config, facts={"model": "tiny-llama", "date": "2026-11-25"})
    assert page.js("document.querySelector('h1').textContent") == "runs & co"
    facts = page.js("document.getElementById('facts').innerText.replace(/\\s+/g, ' ')")
    for fact in ("model tiny-llama", "date 2026-11-25", "λ 0.0001", "τ 0.3", "attention statistic lift", "reward ngram 3"):
        assert fact in facts
    scored = [trace for trace in traces if trace.reward is not None]
    summary = page.js("[...document.querySelectorAll('#summary dd')].map(e => e.textContent)")
    assert summary == [
        "5",
        f"{np.mean([trace.reward for trace in scored]):.3f}",
        f"{np.mean([len(trace.token_ids) for trace in scored]):.0f}",
        f"{100 * np.mean([trace.scores.repeated_share for trace in scored]):.1f}\u202f%",
    ]
    page.assert_quiet()
    assert re.search(r"date \d{4}-\d\d-\d\d", open_page([]).find("#facts").text.replace("\n", " ")), (
        "today, unless another is given"
    )


def test_rows_have_the_numbers_of_their_traces_and_errors_are_shown(page, traces):
    rows = page.js("[...document.querySelectorAll('.row')].map(e => [...e.querySelectorAll('.value')].map(c => c.textContent))")
    assert page.names() == [trace.name for trace in traces]
    for row, trace in zip(rows, traces, strict=True):
        if trace.error is not None:
            assert row == [NONE] * 4
            continue
        reward = NONE if trace.reward is None else f"{trace.reward:.3f}"
        repeated = f"{100 * trace.scores.repeated_share:.1f}\u202f%"
        assert row == [reward, str(len(trace.token_ids)), f"{trace.scores.entropy:.2f}", repeated]
    assert "empty completion: it has no tokens" in page.find(".row .error").text


@pytest.mark.parametrize(
    ("column", "once", "twice"),
    [
        ("name", ["alpha", "beta", "delta", "gamma", "none"], ["none", "gamma", "delta", "beta", "alpha"]),
        ("reward", ["beta", "gamma", "alpha", "delta", "none"], ["alpha", "gamma", "beta", "delta", "none"]),
        ("tokens", ["beta", "alpha", "gamma", "none", "delta"], ["none", "gamma", "alpha", "beta", "delta"]),
    ],
)
def test_sorting_by_a_column_and_back_with_missing_values_last(page, column, once, twice):
    button = page.find(f"#columns .{column} button")
    button.click()
    assert page.names() == once
    button.click()
    assert page.names() == twice
    assert page.js("document.querySelectorAll('[aria-sort=none]').length") == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ALPH", {"alpha"}),
        ("second prompt", {"gamma"}),
        ("empty compl", {"delta"}),
        ("w500 w0", {"gamma"}),
        ("short", {"alpha", "gamma"}),
        ("nothing like it", set()),
    ],
    ids=["name", "prompt", "error", "completion", "column", "nothing"],
)
def test_filter_looks_into_names_prompts_errors_columns_and_completions(page, text, found):
    page.find("#filter").send_keys(text)
    page.wait("!document.getElementById('found').textContent.includes('searching')")
    assert set(page.names()) == found
    assert page.find("#found").text == f"{len(found)} of 5"
    assert page.js("document.querySelector('#summary dd').textContent") == str(len(found))


def test_columns_of_few_values_can_be_chosen_by(page):
    from selenium.webdriver.support.ui import Select

    labels = page.js("[...document.querySelectorAll('#filters label')].map(e => e.firstChild.textContent)")
    assert labels == ["Filter", "kind", "Rows"]
    Select(page.find("#filters label:nth-of-type(2) select")).select_by_visible_text("short")
    assert page.names() == ["alpha", "gamma"]
    assert page.js("document.querySelectorAll('.point.faint').length") == 1, "the chart follows the filter"
    Select(page.find("#filters label:nth-of-type(2) select")).select_by_visible_text("all")
    Select(page.find("#state")).select_by_visible_text("with an error")
    assert page.names() == ["delta"]


def test_list_by_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    page.keys(Keys.TAB)
    assert page.js("document.activeElement.id") == "skip"
    page.keys(Keys.ENTER)
    assert page.js("document.activeElement.id") == "list"
    while page.js("!document.activeElement.matches('.row')"):
        page.keys(Keys.TAB)
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    page.keys(Keys.ENTER)
    page.wait("!document.getElementById('trace').hidden")
    assert page.js("document.activeElement.textContent") == "alpha"
    page.keys(Keys.ESCAPE)
    page.wait("document.getElementById('trace').hidden")
    assert page.js("document.activeElement.querySelector('.title').textContent") == "alpha"
    page.keys(Keys.END)
    assert page.js("document.activeElement.querySelector('.title').textContent") == "none"
    page.assert_quiet()


# One trace


def test_every_token_is_shaded_by_its_class_of_importance_and_protected_ones_are_outlined(page, traces):
    page.load("#trace=1")
    trace = traces[0]
    importance = np.concatenate([t.importance for t in traces if t.error is None])
    edges = np.round(np.quantile(importance, np.arange(1, 7) / 7, method="lower"), 3)
    assert page.js("[...document.querySelectorAll('.swatch')].map(e => e.textContent)") == [
        "lowest",
        *(f"{edge:.2f}".replace("-", MINUS) for edge in edges),
    ]
    classes = page.js("[...document.querySelectorAll('.text .t')].map(e => [...e.classList])")
    assert len(classes) == len(trace.token_ids)
    for at, own in enumerate(classes):
        shade = int((np.round(trace.importance[at], 3) >= edges).sum())
        assert f"s{shade}" in own
        assert ("p" in own) == trace.protected[at]
        neighbours = (at and trace.protected[at - 1], at + 1 < len(classes) and trace.protected[at + 1])
        assert ("first" in own, "last" in own) == tuple(trace.protected[at] and not other for other in neighbours)
    outline = "getComputedStyle(document.querySelector(arguments[0])).borderTopStyle"
    assert page.js(outline, ".text .p") == "solid"
    assert page.js(outline, ".text .t:not(.p)") == "none"


def test_pointer_and_keyboard_show_the_numbers_of_a_token(page, traces):
    from selenium.webdriver.common.keys import Keys

    page.load("#trace=1")
    trace = traces[0]
    for at in (0, 17, list(trace.protected).index(True)):
        page.hover(page.token(at))
        card = page.card()
        assert shown_numbers(trace, at).items() <= card.items()
        assert card["token"] == trace.pieces[at].replace(" ", "␣")
        assert card["where"] == f"token {at + 1} of 300, id {trace.token_ids[at]}"
        assert card["state"].startswith("Protected" if trace.protected[at] else "Counted")
    page.token(5).click()
    page.hover(page.find(".pane h2"))
    assert shown_numbers(trace, 5).items() <= page.card().items(), "what has the focus is shown when the pointer is gone"
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert shown_numbers(trace, 6).items() <= page.card().items()
    assert page.js("document.activeElement === document.querySelectorAll('.text .t')[6]")
    again = list(trace.token_ids).index(trace.token_ids[6], 7)
    page.keys("n")
    assert page.card()["where"].startswith(f"token {again + 1} ")
    page.keys("p", Keys.ARROW_DOWN)
    below = page.js(
        "document.activeElement.getBoundingClientRect().top - arguments[0].getBoundingClientRect().top", page.token(6)
    )
    assert 10 < below < 60
    page.keys(Keys.ARROW_UP, Keys.END)
    assert shown_numbers(trace, 299).items() <= page.card().items()
    page.keys(Keys.ARROW_RIGHT, Keys.HOME)
    assert shown_numbers(trace, 0).items() <= page.card().items()
    page.assert_quiet()


def test_arrow_keys_work_as_soon_as_a_trace_is_opened(page, traces):
    from selenium.webdriver.common.keys import Keys

    focused = "document.activeElement.at ?? null"
    for opened in (lambda: page.load("#trace=1"), lambda: page.find("#next").click()):
        opened()
        page.wait("document.activeElement.matches('.pane h2')")
        page.keys(Keys.ARROW_RIGHT)
        assert page.js(focused) == 0, "the first key shows where the cursor is"
        page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert page.js(focused) == 2
    assert page.card()["where"] == "token 3 of 120, id " + str(traces[1].token_ids[2])
    page.js("document.activeElement.blur()")
    page.keys(Keys.ARROW_LEFT)
    assert page.js(focused) == 2, "what has no focus any more gets it back"
    page.find("#versus").send_keys(Keys.ARROW_LEFT)
    assert page.js("document.activeElement.id") == "versus", "a control keeps its own keys"


def test_the_card_names_the_ngram_that_the_reward_counts(open_page, traces):
    page = open_page(traces, config=ScoreConfig(reward_ngram=4))
    page.load("#trace=1")
    page.hover(page.token(list(traces[0].protected).index(False)))
    assert page.card()["state"] == "The reward counts the 4-gram that ends here."
    page.hover(page.token(list(traces[0].protected).index(True)))
    assert page.card()["state"] == "Protected: the reward does not look at it."


def test_the_same_token_elsewhere_is_marked(page, traces):
    page.load("#trace=1&token=5")
    page.wait("document.activeElement === document.querySelectorAll('.text .t')[4]")
    assert shown_numbers(traces[0], 4).items() <= page.card().items()
    marked = page.js("[...document.querySelectorAll('.text .t')].flatMap((e, i) => e.classList.contains('same') ? [i] : [])")
    assert marked == [i for i, token in enumerate(traces[0].token_ids) if token == traces[0].token_ids[4]]


def test_a_position_of_the_chart_is_chosen_with_the_keyboard(page, traces):
    from selenium.webdriver.common.keys import Keys

    page.load("#trace=1")
    page.wait("document.querySelector('.positions svg') !== null")
    page.js("document.querySelector('.positions svg').focus()")
    at = "Number(document.querySelector('.positions svg').getAttribute('aria-valuenow'))"
    page.keys(Keys.END)
    assert page.js(at) == len(traces[0].token_ids)
    page.keys(Keys.ARROW_RIGHT)
    assert page.js(at) == len(traces[0].token_ids), "there is nothing beyond the last token"
    page.keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    chosen = page.js(at)
    assert 1 < chosen < len(traces[0].token_ids)
    page.keys(Keys.ENTER)
    page.wait(f"document.activeElement === document.querySelectorAll('.text .t')[{chosen - 1}]")
    assert page.js(at) == chosen
    page.assert_quiet()


def test_charts_have_titles_axes_with_units_captions_and_the_numbers_of_the_trace(page, traces):
    page.load("#trace=1")
    trace = traces[0]
    charts = page.js(
        "[...document.querySelectorAll('#charts figure')].map(e => [e.querySelector('h3').textContent, e.innerText])"
    )
    assert [title for title, _ in charts] == ["Importance over position", "Most repeated tokens", "Most repeated runs"]
    labels = page.js("[...document.querySelectorAll('.positions .label')].map(e => e.textContent)")
    assert labels == ["position (tokens from the start)", "importance (nats)"]
    assert page.js("[...document.querySelectorAll('figcaption')].every(e => e.textContent.length > 80)")

    def bars(figure):
        script = "[...document.querySelectorAll(arguments[0] + ' .run')].map(e => [...e.children].map(c => c.textContent))"
        return [(text, times) for text, _, times in page.js(script, figure)]

    expected = [(run.text.replace(" ", "␣", 1), str(run.times)) for run in trace.most_repeated(1, 8)]
    assert bars(".repeats-1") == expected
    page.find(".repeats-n .choice button").click()
    assert bars(".repeats-n") == [(run.text.replace(" ", "␣", 1), str(run.times)) for run in trace.most_repeated(2, 8)]
    page.find(".repeats-n .run").click()
    run = trace.most_repeated(2, 1)[0]
    marked = page.js("[...document.querySelectorAll('.text .t')].flatMap((e, i) => e.classList.contains('same') ? [i] : [])")
    pairs = list(itertools.pairwise(trace.token_ids))
    places = [i for i, pair in enumerate(pairs) if pair == tuple(trace.token_ids[run.first : run.first + 2])]
    assert marked == sorted({i + k for i in places for k in (0, 1)})
    assert page.card()["where"].startswith(f"token {run.first + 1} ")


def test_a_point_of_reward_against_length_opens_its_trace(page, traces):
    from selenium.webdriver.common.keys import Keys

    points = page.js(
        "[...document.querySelectorAll('.point')].map(e => [Number(e.dataset.trace), e.cx.baseVal.value, e.cy.baseVal.value])"
    )
    by_trace = {index: (x, y) for index, x, y in points}
    assert sorted(by_trace) == [0, 1, 2], "those with a reward"
    slope = (by_trace[0][0] - by_trace[1][0]) / (300 - 120)
    assert by_trace[2][0] == pytest.approx(by_trace[1][0] + slope * (41 - 120), abs=0.1)
    assert by_trace[1][1] < by_trace[2][1] < by_trace[0][1], "a higher reward stands higher"
    page.hover(page.find(".point[data-trace='1']"))
    assert page.find("#scatter .reading").text == "alpha: reward 0.830, 120 tokens"
    page.find(".point[data-trace='1']").click()
    page.wait("!document.getElementById('trace').hidden")
    assert page.find(".pane h2").text == "alpha"
    page.load()
    page.js("document.querySelector('#scatter svg').focus()")
    page.keys(Keys.END, Keys.ARROW_LEFT, Keys.ENTER)
    page.wait("!document.getElementById('trace').hidden")
    assert page.find(".pane h2").text == "alpha"


def test_two_traces_of_one_prompt_side_by_side(page, traces):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    page.load("#trace=3")
    assert not page.find("#versus").is_enabled(), "gamma has a prompt of its own"
    page.load("#trace=1")
    choice = Select(page.find("#versus"))
    assert [option.text for option in choice.options[1:]] == ["alpha, reward 0.830"]
    choice.select_by_index(1)
    page.wait("document.querySelectorAll('.pane').length === 2")
    assert page.js("[...document.querySelectorAll('.pane h2')].map(e => e.textContent)") == ["beta", "alpha"]
    lefts = page.js("[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().left)")
    tops = page.js("[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().top)")
    assert lefts[1] > lefts[0] + 300
    assert tops[0] == tops[1]
    assert page.text(1) == [ord(c) for c in "".join(traces[1].pieces)]
    assert page.js("document.querySelector('.pane:nth-child(2) .numbers .change').textContent") == "+0.220"
    page.token(len(traces[0].token_ids) + 3).click()
    assert shown_numbers(traces[1], 3).items() <= page.card().items()
    assert page.card()["where"].startswith("alpha, token 4 ")
    same = page.js("[...document.querySelectorAll('.text')].map(e => e.querySelectorAll('.same').length)")
    assert same == [list(trace.token_ids).count(traces[1].token_ids[3]) for trace in traces[:2]], "marked in both"
    page.keys(Keys.ESCAPE)
    page.wait("document.querySelectorAll('.pane').length === 1")
    page.keys(Keys.ESCAPE)
    page.wait("document.getElementById('trace').hidden")
    page.assert_quiet()


def test_previous_and_next_follow_the_list(page):
    page.find("#columns .name button").click()
    page.find(".row").click()
    page.wait("!document.getElementById('trace').hidden")
    assert page.find(".pane h2").text == "alpha"
    assert page.js("!document.getElementById('previous').hasAttribute('href')")
    page.find("#next").click()
    page.wait("document.querySelector('.pane h2').textContent === 'beta'")
    page.find("#next").click()
    page.wait("document.querySelector('.pane h2').textContent === 'delta'")
    assert page.find(".notice").text == "empty completion: it has no tokens"


# What can be wrong with the data


def test_ticks_are_at_lengths_rewards_and_positions_that_there_can_be(open_page):
    page = open_page([trace_of("a", [1], reward=1.0), trace_of("b", [1, 2, 3], reward=0.0)])
    page.wait("document.querySelector('#scatter .tick')")
    ticks = "[...document.querySelectorAll(arguments[0] + ' .tick')].map(e => [e.textContent, e.getAttribute('text-anchor')])"

    def at(selector, anchor):
        return [float(text.replace(MINUS, "-")) for text, own in page.js(ticks, selector) if own == anchor]

    across, up = at("#scatter", "middle"), at("#scatter", "end")
    assert len(across) >= 2
    assert min(across) >= 0
    assert len(up) >= 2
    assert (min(up), max(up)) == (0, 1)
    page.load("#trace=1")
    page.wait("document.querySelector('.positions .tick')")
    assert at(".positions", "middle") == [1], "a trace of one token has no second one"


def test_right_to_left_text_is_laid_out_so(open_page):
    words = [
        "\u0645\u0631\u062d\u0628\u0627",
        " \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
        ".\n",
        "left",
        " to",
        " right",
        " \u05e9\u05dc\u05d5\u05dd",
    ]
    hebrew = "\u05de\u05d4 \u05d6\u05d4?"
    traces = [
        trace_of(hebrew, range(7), words=words, prompt=f"{hebrew}\nWhat?", protected=[True, True, *[False] * 4, True]),
        trace_of("latin", range(7), words=[f" w{i}" for i in range(7)], prompt="one\ntwo"),
    ]
    page = open_page(traces)
    right = "(e => { const r = document.createRange(); r.selectNodeContents(e); return r.getBoundingClientRect().right; })"
    ends = f"[...document.querySelectorAll('.row .title')].map(e => [{right}(e), e.getBoundingClientRect().right])"
    (of_hebrew, edge), (of_latin, _) = page.js(ends)
    assert abs(of_hebrew - edge) < 1, "a name begins at the right"
    assert of_latin < edge - 50
    page.load("#trace=1")
    page.wait("document.querySelector('.text .t')")
    boxes = page.js(
        "[...document.querySelectorAll('.text .t')].map(e => (r => [r.left, r.right, r.top])(e.getClientRects()[0]))"
    )
    text = page.js("(r => [r.left, r.right])(document.querySelector('.text .block').getBoundingClientRect())")
    assert abs(boxes[0][1] - text[1]) < 1, "the first line begins at the right edge"
    assert boxes[1][1] <= boxes[0][0] + 1, "the next token is to the left of the first"
    assert boxes[2][0] < boxes[1][0], "and what ends the sentence at the left"
    assert abs(boxes[3][0] - text[0]) < 1, "the second line begins at the left edge"
    assert boxes[3][0] < boxes[4][0] < boxes[5][0] < boxes[6][0]
    border = (
        "(s => [s.borderLeftStyle, s.borderRightStyle])(getComputedStyle(document.querySelectorAll('.text .t')[arguments[0]]))"
    )
    assert page.js(border, 0) == ["none", "solid"], "the outline of a run begins at the right"
    assert page.js(border, 1) == ["solid", "none"], "and ends at the left"
    prompt = page.js("getComputedStyle(document.querySelector('.prompt p')).unicodeBidi")
    assert prompt == "plaintext", "each line of a prompt has its own direction"


@pytest.fixture
def marked_page(open_page):
    """A page of one trace of 20 tokens: 8 labels, so that colors and patterns come again, one of them twice and around another;
    a place; what was left out."""
    words = [f" w{i}" for i in range(20)]
    ends = list(itertools.accumulate(map(len, words)))
    starts = [0, *ends[:-1]]

    def over(label, first, last):
        return Mark(label, first, last, starts[first], ends[last])

    marks = [over("plan", 0, 3), over("check", 1, 1), *(over(f"kind {i}", i, i) for i in range(4, 10)), over("plan", 15, 16)]
    marks.insert(-1, Mark("settled", 12, 12, starts[12], starts[12]))
    left_out = ["notes: 1 of 9 marks are left out"]
    return open_page([trace_of("marked", range(20), words=words, marked=marks, left_out=left_out)])


def test_marks_have_a_legend_with_keys_that_go_from_one_to_the_next(marked_page):
    marked_page.load("#trace=1")
    keys = "[...document.querySelectorAll('#legend .key')].map(e => [...e.children].map(c => c.textContent))"
    kinds = [
        [letter, f"kind {i}", f"(characters {9 + 3 * (i - 4) + 3} to {9 + 3 * (i - 4) + 6})"]
        for i, letter in enumerate("CDEFGH", 4)
    ]
    assert marked_page.js(keys) == [
        ["A", "plan", "2"],
        ["B", "check", "(characters 3 to 6)"],
        *kinds,
        ["\u25bc", "settled", "(character 38)"],
    ]
    assert marked_page.js("document.querySelector('.notice').textContent") == "notes: 1 of 9 marks are left out"

    def focused():
        return marked_page.js("[...document.querySelectorAll('.text .t')].indexOf(document.activeElement)")

    key = marked_page.find("#legend .key")
    for token in (0, 15, 0):  # no token was looked at before
        key.click()
        assert focused() == token
    marked_page.load("#trace=1&token=1")
    for pressed, token in [
        ("m", 1),
        ("m", 4),
        *(("m", i) for i in range(5, 10)),
        ("m", 12),
        ("m", 15),
        ("m", 0),
        ("M", 15),
        ("M", 12),
    ]:
        marked_page.keys(pressed)
        assert focused() == token
    marked_page.assert_quiet()


def test_marks_are_named_in_the_text_and_on_the_card_of_their_tokens(marked_page):
    marked_page.load("#trace=1&token=2")
    lines = "[...document.querySelectorAll('#card .state.mark')].map(e => [...e.children].map(c => c.textContent))"
    assert marked_page.js(lines) == [["A", "plan (characters 0 to 12)"], ["B", "check (characters 3 to 6)"]]
    marked_page.load("#trace=1&token=13")
    assert marked_page.js(lines) == [["\u25bc", "settled (character 38)"]]
    marked_page.load("#trace=1&token=12")
    assert marked_page.js(lines) == []
    # A sign stands before the token where a mark begins. A strip is under all its tokens; of two marks, the inner one's.
    signs = marked_page.js(
        "[...document.querySelectorAll('.text .letter')].map(e => [e.dataset.sign, e.nextElementSibling.at])"
    )
    assert signs == [
        ["A", 0],
        ["B", 1],
        *([letter, i] for i, letter in enumerate("CDEFGH", 4)),
        ["\u25bc settled", 12],
        ["A", 15],
    ]
    look = "(s => [s.getPropertyValue('--c'), s.backgroundImage.split('(')[0], s.backgroundSize])(getComputedStyle(e))"
    looks = marked_page.js(f"[...document.querySelectorAll('.text .t')].map(e => e.classList.contains('mk') ? {look} : null)")
    assert [i for i, one in enumerate(looks) if one] == [*range(10), 15, 16]
    assert looks[0] == looks[2] == looks[3] == looks[15] == looks[16]
    of_labels = [looks[0], looks[1], *looks[4:10]]
    assert len(set(map(tuple, of_labels))) == 8
    assert "".join(marked_page.js("[...document.querySelectorAll('.text .t')].map(e => e.textContent)")) == "".join(
        f" w{i}" for i in range(20)
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_marks(marked_page, scheme):
    """WCAG AA, as below: letters and labels are text, strips are not."""
    marked_page.prefers(scheme)
    marked_page.load("#trace=1&token=2")
    assert marked_page.js("document.documentElement.dataset.theme") == scheme
    behind = (
        "(e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;"
        " if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; } })(e)"
    )
    found = marked_page.js(
        "[...document.querySelectorAll('.letter, .key bdi, .key small, .state.mark bdi')]"
        f".map(e => [getComputedStyle(e).color, {behind}])"
    )
    assert len(found) == 3 * 9 + 10 + 2 * 2
    assert min(contrast(rgb(ink), rgb(background)) for ink, background in found) >= 4.5
    strips = marked_page.js(
        "arguments[0].flatMap(shade => [...Array(7).keys()].map(color => { const e = document.querySelector('.text .t');"
        " e.className = `t ${shade} mk c${color} d0`; const s = getComputedStyle(e);"
        " return [s.backgroundImage, s.backgroundColor]; }))",
        SHADES,
    )
    assert len({strip for strip, _ in strips}) == 7
    assert min(contrast(rgb(strip), rgb(shade)) for strip, shade in strips) >= 3


def test_text_that_is_markup_is_shown_and_never_run(open_page, tmp_path):
    lone = "\ud800"
    pieces = [HOSTILE, lone, "</SCRIPT >", "\n", ""]
    hostile = trace_of(
        HOSTILE, range(5), prompt=HOSTILE + lone, words=pieces, columns={HOSTILE: HOSTILE, "list": [HOSTILE, math.nan]}
    )
    other = trace_of("other", [0, 0, 0, 0], words=pieces, prompt=HOSTILE + lone, columns={HOSTILE: "b", "list": None})
    broken = Trace(name=lone, prompt="", error=HOSTILE)
    page = open_page([hostile, other, broken], title=HOSTILE + lone, facts={HOSTILE: HOSTILE})
    assert page.path.read_bytes().isascii()
    page.load("#trace=1&beside=2")
    assert page.text() == np.frombuffer("".join(pieces).encode("utf-16-le", "surrogatepass"), dtype="<u2").tolist()
    assert page.js("document.querySelectorAll('.run').length") > 0
    page.js("arguments[0].focus()", page.token(0))
    assert page.card()["token"] == HOSTILE
    assert page.js("document.querySelector('.pane h2').textContent") == HOSTILE
    assert page.js("document.querySelector('.prompt p').textContent.startsWith(arguments[0])", HOSTILE)
    assert page.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert page.js("typeof window.hacked") == "undefined"
    page.assert_quiet()

    page.driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.head.append(s);"
        "document.body.insertAdjacentHTML('beforeend', "
        "`<img src=x onerror='window.hacked = 1'><style>body{color:red}</style>`);"
    )
    time.sleep(0.1)
    assert page.js("typeof window.hacked") == "undefined", "the policy must stop what gets in all the same"
    assert len(page.driver.get_log("browser")) >= 3


def test_characters_without_a_shape_are_seen_and_reorder_nothing(open_page):
    pieces = ["abc ", "\u202e", "DEF ", "\u200bGHI ", "JKL"]
    page = open_page([trace_of("bidi", range(5), words=pieces)])
    page.load("#trace=1")
    boxes = page.js("[...document.querySelectorAll('.text .t')].map(e => [e.getBoundingClientRect().left, e.offsetWidth])")
    assert [left for left, _ in boxes] == sorted(left for left, _ in boxes), "an override would turn the tokens after it round"
    assert boxes[1][1] > 10, "it can be pointed at"
    signs = page.js("[...document.querySelectorAll('.text .t')].map(e => getComputedStyle(e, '::before').content)")
    assert signs == ["none", '"<U+202E>"', "none", '"<U+200B>"', "none"]
    assert page.text() == [ord(c) for c in "".join(pieces)], "what is copied is the text itself"
    page.token(1).click()
    assert page.card()["token"] == "<U+202E>"
    page.assert_quiet()


def test_rows_without_a_prompt_are_not_of_one_prompt(open_page):
    page = open_page([trace_of("a", [1, 2], prompt=""), trace_of("b", [1, 2], prompt="")])
    page.load("#trace=1")
    assert page.js("document.getElementById('versus').disabled")
    page.assert_quiet()


def test_numbers_that_are_huge_or_not_finite(open_page):
    trace = trace_of(
        "huge",
        [1, 1, 2, 3],
        logprobs=[-1e300, -0.5, math.nan, -math.inf],
        incoming=[1e30, 3e9, 0.25, 1e-9],
        importance=[3.4e38, -1e20, math.inf, 0.0004999],
    )
    page = open_page([trace])
    page.load("#trace=1")
    expected = [
        (f"{MINUS}1.000e+300", "1.000e+30", "3.400e+38"),
        (f"{MINUS}0.500", "3.000e+9", f"{MINUS}1.000e+20"),
        ("not a number", "0.250000", "+∞"),
        (f"{MINUS}∞", "0.000000", "0.000"),
    ]
    for at, numbers in enumerate(expected):
        page.token(at).click()
        card = page.card()
        found = tuple(card[name].removesuffix(" nats") for name in ("log-prob", "incoming attention", "importance"))
        assert found == numbers
    page.assert_quiet()


@pytest.mark.parametrize(
    "given",
    [
        [],
        [trace_of("empty", [])],
        [trace_of("one", [7])],
        [trace_of(f"row {i}", [i, i + 1], reward=0.5) for i in range(3)],
        [trace_of("none", [7, 8], reward=None)],
        [Trace(name="bad", prompt="", error="malformed: no")],
    ],
    ids=["no trace", "no tokens", "one token", "equal rewards", "no reward", "only errors"],
)
def test_little_or_nothing_to_show(open_page, given):
    page = open_page(given)
    assert page.names() == [trace.name for trace in given]
    if not given:
        assert page.find("#found").text == "No traces in this page."
    for number in range(1, len(given) + 1):
        page.load(f"#trace={number}")
    assert page.js("!document.body.innerText.includes('NaN') && !document.body.innerText.includes('undefined')")
    page.driver.get(page.path.as_uri() + "#trace=99")
    page.wait("!document.getElementById('overview').hidden")
    page.assert_quiet()


def test_two_traces_of_one_name_and_lists_that_do_not_fit_are_refused(tmp_path):
    twice = [trace_of("same", [1]), trace_of("same", [2])]
    with pytest.raises(ValueError, match=r"two traces have name='same'.*number them"):
        write_page(twice, tmp_path / "x.html", title="x", config=ScoreConfig())
    short = trace_of("short", [1, 2], logprobs=[-1.0])
    with pytest.raises(ValueError, match=r"trace 'short' has 2 token_ids.*1 logprobs"):
        write_page([short], tmp_path / "x.html", title="x", config=ScoreConfig())


# How it looks


def luminance(color):
    channels = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)[:3]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_text_shades_and_outlines(page, scheme):
    """WCAG AA: 4.5 for text, 3 for what is not text."""
    page.prefers(scheme)
    page.load("#trace=1")
    assert page.js("document.documentElement.dataset.theme") == scheme
    fades = page.js("getComputedStyle(document.getElementById('theme')).transitionDuration")
    assert fades == "0s", "a page that loads does not fade in from the other theme"
    dark = luminance(rgb(page.js("getComputedStyle(document.body).backgroundColor"))) < 0.1
    assert dark == (scheme == "dark")
    colors = page.js(
        "arguments[0].map(shade => { const e = document.querySelector('.text .t'); e.className = 't p ' + shade;"
        " const s = getComputedStyle(e); return [s.color, s.backgroundColor, s.borderTopColor]; })",
        SHADES,
    )
    backgrounds = [luminance(rgb(background)) for _, background, _ in colors]
    assert len({background for _, background, _ in colors}) == len(SHADES)
    assert backgrounds == sorted(backgrounds, reverse=scheme == "light"), "the more important, the further from the paper"
    for ink, background, outline in colors:
        assert contrast(rgb(ink), rgb(background)) >= 4.5
        assert contrast(rgb(outline), rgb(background)) >= 3
    # All other text on whatever stands behind it.
    page.load("#trace=1&beside=2")
    for hidden in (False, True):
        if hidden:
            page.load()
        low = page.js(
            """(() => {
              const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                if (c !== 'rgba(0, 0, 0, 0)' && c !== 'transparent') return c; } };
              const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
              while (walker.nextNode()) { const e = walker.currentNode.parentElement;
                if (!walker.currentNode.data.trim() || !e.checkVisibility() || e.closest('script, .skip')) continue;
                const style = getComputedStyle(e);
                found.push([e.closest('svg') ? style.fill : style.color, behind(e), e.className.baseVal ?? e.className]); }
              return found; })()"""
        )
        assert len(low) > 40
        for ink, background, where in low:
            assert contrast(rgb(ink), rgb(background)) >= 4.5, where


def test_light_and_dark_by_button_over_what_the_system_says(page):
    page.prefers("dark")
    page.load()
    theme = "document.documentElement.dataset.theme"
    assert page.js(theme) == "dark"
    button = page.find("#theme")
    assert button.text == "Light"
    button.click()
    assert page.js(theme) == "light"
    page.load()
    assert page.js(theme) == "light", "it is remembered"
    page.find("#theme").click()
    page.js("localStorage.clear()")


@pytest.mark.parametrize(("width", "scale"), [(360, 1), (640, 2)], ids=["narrow", "200 % of 1280"])
def test_narrow_or_zoomed_nothing_is_cut_off(page, width, scale):
    page.width(width, scale)
    for fragment in ("", "#trace=1", "#trace=1&beside=2"):
        page.load(fragment)
        assert page.js("document.documentElement.scrollWidth") <= width
        outside = page.js(
            "[...document.querySelectorAll('button, select, input, a.button, .t, figcaption, dd, h2')]"
            ".filter(e => e.checkVisibility()).filter(e => e.getBoundingClientRect().right > innerWidth + 1 ||"
            " e.getBoundingClientRect().left < -1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert outside == []
    page.find(".text .t").click()
    top, bottom, window = page.box("document.getElementById('card')")
    assert 0 <= top < bottom <= window, "the numbers are in the window, with the token"


# How much it holds


def test_500_traces_of_8192_tokens_open_in_less_than_3_seconds_and_scroll(open_page, monkeypatch):
    rng = np.random.default_rng(0)
    bases = []
    for seed in range(4):
        ids = np.minimum(rng.zipf(1.3, 8192), 20_000)
        ids[59::60] = 0
        bases.append(trace_of(f"base {seed}", ids.tolist(), seed=seed, words=["\n", *(f" w{i}" for i in range(1, 20_001))]))
    # Counting in Python what repeats is most of the work of writing: once for each base.
    repeated = {id(base.pieces): {length: base.most_repeated(length, 8) for length in (1, 2, 4, 8)} for base in bases}
    monkeypatch.setattr(Trace, "most_repeated", lambda self, length, limit: repeated[id(self.pieces)][length])
    made = (
        replace(
            bases[i % 4],
            name=f"trace {i}",
            prompt=f"prompt {i // 2}",
            scores=replace(bases[i % 4].scores, reward=0.4 + i / 1000),
        )
        for i in range(500)
    )
    page = open_page(made)
    timing = page.js("performance.getEntriesByType('navigation')[0].toJSON()")
    paint = page.js("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    started = time.monotonic()
    page.load("#trace=500")
    opened = time.monotonic() - started
    size = page.path.stat().st_size / 2**20
    loaded = timing["loadEventEnd"]
    print(f"{size:.0f} MiB: first paint {paint:.0f} ms, loaded {loaded:.0f} ms, loaded with a trace open {opened:.2f} s")
    assert 0 < loaded < 3000
    assert opened < 3

    assert page.js("document.querySelectorAll('.text .t').length") == 8192
    from selenium.webdriver.common.keys import Keys

    for _ in range(8):  # what a first jump draws pushed the token out of the window one time in five
        page.load("#trace=500")
        page.driver.execute_script("scrollTo(0, document.body.scrollHeight)")
        page.js("document.querySelectorAll('.text .t')[0].focus()")
        page.keys(Keys.END)
        page.js("new Promise(done => setTimeout(done, 200))")
        top, bottom, window = page.box("document.activeElement")
        assert 0 <= top < bottom <= window
    assert page.card()["where"].startswith("token 8,192 of 8,192")
    assert shown_numbers(bases[3], 8191)["log-prob"] == page.card()["log-prob"]

    page.load()
    assert page.js("document.querySelectorAll('.row').length") < 60, "rows outside the window are not there"
    page.driver.execute_script("scrollTo(0, document.body.scrollHeight)")
    page.wait("[...document.querySelectorAll('.row .title')].some(e => e.textContent === 'trace 499')")
    page.find("#filter").send_keys("w19998 ")
    page.wait("!document.getElementById('found').textContent.includes('searching')", 20)
    page.assert_quiet()


def test_a_page_of_the_shipped_traces(open_page):
    """All of them, one token per character, with random numbers."""
    from tiny_tokenizer import build_tokenizer

    from entra.traces import load_traces
    from entra.view.trace import pieces_of

    tokenizer = build_tokenizer()
    rows = [(problem, completion) for problem in load_traces() for completion in problem.completions]
    made = []
    for number, (problem, completion) in enumerate(rows):
        ids = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        columns = {"kind": completion.kind, "task": problem.task, "correct": completion.correct}
        made.append(
            trace_of(f"{problem.id} {number}", ids, prompt=problem.prompt, columns=columns, pieces=pieces_of(tokenizer, ids))
        )
    page = open_page(made)
    page.load("#trace=1&beside=3")
    assert page.text(1) == [ord(c) for c in "".join(made[2].pieces)]
    page.assert_quiet()
