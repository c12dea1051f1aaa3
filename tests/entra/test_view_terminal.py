"""Traces in the terminal: the program driven by keys and mouse, the plain text, and nothing in a token's text interpreted."""

import asyncio
import io
import random

import pytest
from rich.cells import cell_len
from shown_traces import scores_of

from entra.view.blocks import bars, column_chart, scatter
from entra.view.filtering import matches
from entra.view.lines import token_facts
from entra.view.terminal import print_traces
from entra.view.trace import Repeated, Trace
from entra.view.visible import visible
from entra.view.wrapping import wrapped

pytest.importorskip("textual", reason="pip install 'entra-reward[inspect]'")
from textual.widgets import DataTable, Input, Static

from entra.view.terminal_app import Inspector, ListScreen, TokenText, TracePane, TraceScreen

HOSTILE = ["\x1b[31m", "[bold]", "\x07", "\r", "\u202e", "\x9b2J", "\ud800", "<script>", "\u200d", "\u2028"]
WORDS = [" the", " answer", " is", "7", ".\n", "\t", " 日本", "🙂", "", "\n\n", *HOSTILE]


def trace(name, tokens, *, prompt="What is 3 + 4?", seed=0, reward=0.5, **columns):
    """Token i of a trace is word i first, then at random."""
    generator = random.Random(seed)
    ids = [i if i < len(WORDS) else generator.randrange(len(WORDS)) for i in range(tokens)]
    importance = [generator.uniform(-5, 0) for _ in ids]
    cut = sorted(importance)[-max(1, tokens // 5)]
    return Trace(
        name=name,
        prompt=prompt,
        pieces=[WORDS[i] for i in ids],
        scores=scores_of(
            ids,
            logprobs=[value - 0.25 for value in importance],
            incoming=[0.125] * tokens,
            importance=importance,
            protected=[value >= cut for value in importance],
            reward=reward,
        ),
        columns=columns,
    )


TRACES = [
    trace("first", 100, reward=0.5, task="sum"),
    trace("[red]second\x1b[0m", 300, seed=1, reward=0.25),
    Trace(name="broken", prompt="other", error="missing field: completion is \x1b[31mnull"),
    trace("fourth", 50, prompt="other", seed=2, reward=0.75),
]


def drive(steps, size=(110, 40), traces=TRACES):
    """Run `steps(app, pilot)` in the program."""

    async def run():
        app = Inspector(traces, title="t[bold].jsonl\x07", facts={"model": "tiny"})
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await steps(app, pilot)

    asyncio.run(run())


def names(app):
    table = app.screen.query_one(DataTable)
    return [str(table.get_row_at(i)[0]) for i in range(table.row_count)]


def shown(view):
    """The lines of a token view that are on the screen, with their segments."""
    return [list(view.render_line(y)) for y in range(view.size.height)]


def text_of(widget):
    return str(widget.render())


def test_list_is_sorted_filtered_and_opened():
    async def steps(app, pilot):
        assert names(app) == ["first", "[red]second␛[0m", "broken", "fourth"]
        row = [str(cell) for cell in app.screen.query_one(DataTable).get_row_at(0)]
        assert row[1:3] == ["0.500", "100"]
        assert row[3:5] == [f"{TRACES[0].scores.entropy:.2f}", f"{100 * TRACES[0].scores.repeated_share:.1f}"]
        assert "missing field: completion is ␛[31mnull" in str(app.screen.query_one(DataTable).get_row_at(2)[5])
        await pilot.press("s", "s")  # by name, then by reward
        assert names(app) == ["[red]second␛[0m", "first", "fourth", "broken"]
        await pilot.press("r")
        assert names(app) == ["fourth", "first", "[red]second␛[0m", "broken"], "what has no reward stays last"
        await pilot.press("slash")
        app.screen.query_one(Input).value = "tokens>=100 what"
        await pilot.pause()
        assert names(app) == ["first", "[red]second␛[0m"]
        app.screen.query_one(Input).value = ""
        await pilot.press("escape", "ctrl+home", "enter")
        await pilot.pause()
        assert isinstance(app.screen, TraceScreen)
        assert app.screen.query_one(TracePane).trace.name == "fourth"
        await pilot.press("escape")
        await pilot.pause()
        assert isinstance(app.screen, ListScreen)

    drive(steps)


def test_chart_of_rewards_marks_the_trace_of_the_cursor():
    async def steps(app, pilot):
        chart = text_of(app.screen.query_one(".chart", Static))
        assert "reward against length, tokens" in chart
        assert chart.count("◆") == 1 + 1, "once in the heading, once in the chart"
        at = next(i for i, line in enumerate(chart.split("\n")[1:]) if "◆" in line)
        await pilot.press("down")
        await pilot.pause()
        lines = text_of(app.screen.query_one(".chart", Static)).split("\n")[1:]
        assert next(i for i, line in enumerate(lines) if "◆" in line) > at, "the second trace has a lower reward"
        await pilot.press("down")
        await pilot.pause()
        assert "◆" not in text_of(app.screen.query_one(".chart", Static)), "a trace with an error has no reward"

    drive(steps)


def test_cursor_goes_over_tokens_and_shows_their_numbers():
    async def steps(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        view = app.screen.query_one(TokenText)
        facts = app.screen.query_one(".facts", Static)
        await pilot.press("right", "right", "right")
        await pilot.pause()
        assert view.token == 3
        assert text_of(facts) == "\n".join(token_facts(TRACES[0], 3))
        assert "“7”, id 3" in text_of(facts)
        assert f"importance {TRACES[0].importance[3]:.3f}" in text_of(facts)
        assert f"log-prob {TRACES[0].logprobs[3]:.3f} nats · incoming attention 0.125000" in text_of(facts)
        await pilot.press("n")
        assert view.token == list(TRACES[0].token_ids).index(3, 4)
        await pilot.press("N")
        assert view.token == 3
        await pilot.press("end")
        assert view.token == 99
        await pilot.press("right")
        assert view.token == 99
        await pilot.press("home", "down")
        assert view.token == 5, "the fifth token ends the line"
        await pilot.press("up")
        assert view.token == 0

    drive(steps)


def test_every_token_is_drawn_once_with_its_marks():
    async def steps(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        view = app.screen.query_one(TokenText)
        lines = shown(view)
        segments = [segment for line in lines for segment in line if segment.style and segment.text.strip()]
        drawn = "".join(segment.text for segment in segments)
        for sign in ("␛[31m", "[bold]", "␇", "␍", "<U+202E>", "<U+009B>2J", "<U+D800>", "<script>", "日本", "🙂", "⇥", "↵"):
            assert sign in drawn
        assert not any(ord(character) < 32 or character in "\x7f\x9b\u202e" for character in drawn)
        cursor = [segment for segment in segments if segment.style.reverse]
        assert [segment.text for segment in cursor] == [" the"]
        marked = "".join(segment.text for segment in segments if segment.style.underline)
        protected = [visible(p) for p, is_protected in zip(TRACES[0].pieces, TRACES[0].protected, strict=True) if is_protected]
        assert marked.replace(" ", "") == "".join(protected).replace(" ", "")
        assert all(segment.style.bold == segment.style.underline for segment in segments)
        assert len({segment.style.bgcolor.name for segment in segments}) >= 5, "five shades, and equal tokens"

    drive(steps, size=(110, 60))


def test_mouse_shows_and_chooses_tokens():
    async def steps(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        view = app.screen.query_one(TokenText)
        facts = app.screen.query_one(".facts", Static)
        line = next(y for y, segments in enumerate(shown(view)) if segments[0].text == " the")
        await pilot.hover(TokenText, offset=(6, line))
        await pilot.pause()
        assert "“ answer”" in text_of(facts)
        assert view.token == 0
        await pilot.hover(TokenText, offset=(100, line))
        await pilot.pause()
        assert "“ the”" in text_of(facts), "beside the text it is the cursor's"
        await pilot.click(TokenText, offset=(6, line))
        await pilot.pause()
        assert view.token == 1

    drive(steps)


def test_two_traces_of_a_prompt_side_by_side_and_charts():
    async def steps(app, pilot):
        await pilot.press("enter", "right", "v")
        await pilot.pause()
        panes = list(app.screen.query(TracePane))
        assert [pane.trace.name for pane in panes] == ["first", "[red]second\x1b[0m"]
        assert abs(panes[0].size.width - panes[1].size.width) <= 1
        assert panes[0].query_one(TokenText).token == 1, "the cursor stays"
        assert text_of(panes[1].query_one(".name", Static)) == "[red]second␛[0m"
        await pilot.press("c")
        await pilot.pause()
        for pane in app.screen.query(TracePane):
            text = " ".join(text_of(pane.query_one(".charts", Static)).split())
            assert "importance, in nats" in text
            assert "most repeated unprotected tokens, times" in text
            assert "most repeated runs of 2 tokens" in text
        await pilot.press("v")
        await pilot.pause()
        assert len(app.screen.query(TracePane)) == 1
        await pilot.press("right_square_bracket", "right_square_bracket")
        await pilot.pause()
        pane = app.screen.query_one(TracePane)
        assert pane.trace.name == "broken"
        assert "missing field: completion is ␛[31mnull" in text_of(pane.query_one(".facts", Static))

    drive(steps, size=(80, 24))


def assert_charts_fit(widget):
    """No line is wrapped, and they fill the width that there is."""
    lines = text_of(widget).split("\n")
    width = widget.content_size.width
    assert widget.content_size.height == len(lines)
    assert width - 2 <= max(map(cell_len, lines)) <= width


def test_charts_of_a_trace_fit_80_by_24_beside_its_text_and_survive_a_resize():
    async def steps(app, pilot):
        await pilot.press("enter", *["right"] * 40, "c")
        await pilot.pause()
        view, charts = app.screen.query_one(TokenText), app.screen.query_one(".charts", Static)
        for size in ((80, 24), (60, 20), (120, 40), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            await pilot.pause()
            assert_charts_fit(charts)
            assert view.size.height >= size[1] // 5, "the text can still be read"
            assert any(segment.style.reverse for line in shown(view) for segment in line), "the cursor is on the screen"
        await pilot.press("v")
        await pilot.pause()
        await pilot.pause()
        for widget in app.screen.query(".charts").results(Static):
            assert_charts_fit(widget)

    drive(steps, size=(80, 24), traces=[trace("first", 300), trace("second", 400, seed=1)])


def test_chart_of_the_list_leaves_room_for_the_list_and_survives_a_resize():
    async def steps(app, pilot):
        await pilot.press("c")
        await pilot.pause()
        for size in ((80, 24), (60, 20), (120, 40), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            await pilot.pause()
            chart = app.screen.query_one(".chart", Static)
            lines = text_of(chart).split("\n")
            assert len(lines) == chart.content_size.height
            assert max(map(cell_len, lines)) <= chart.content_size.width
            assert "reward against length, tokens" in lines[0]
            assert app.screen.query_one(DataTable).size.height >= size[1] // 4

    drive(steps, size=(80, 24), traces=[trace(f"{i}", 50 + i, seed=i) for i in range(30)])


def test_right_to_left_text_is_named_where_it_cannot_be_laid_out():
    told = "right-to-left text stands in the order of its letters"
    hebrew = Trace(name="h", prompt="p", pieces=["\u05e9\u05dc", " \u0645"], scores=scores_of([1, 2]))
    for traces, times in (([hebrew], 1), ([TRACES[0]], 0)):
        file = io.StringIO()
        print_traces(traces, title="t", facts={}, file=file)
        assert file.getvalue().count(told) == times


def test_themes_differ_and_text_is_readable_in_both():
    async def steps(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        view = app.screen.query_one(TokenText)
        seen = []
        for _ in range(2):
            styles = {segment.style for line in shown(view) for segment in line if segment.style.underline is not None}
            seen.append({style.bgcolor.name for style in styles})
            for style in styles:
                assert contrast(style.color.triplet, style.bgcolor.triplet) >= 4.5
            await pilot.press("d")
            await pilot.pause()
        assert not seen[0] & seen[1]

    drive(steps)


def contrast(*colours):
    """WCAG 2.1's ratio of relative luminances; 4.5 is what it asks of text."""
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour.normalized] for colour in colours]
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light + 0.05) / (dark + 0.05)


def test_only_what_is_on_the_screen_is_drawn(monkeypatch):
    """40 traces of 8,000 tokens: 30 key presses draw at most the lines of the screen each."""
    drawn = []
    original = TokenText.render_line
    monkeypatch.setattr(TokenText, "render_line", lambda self, y: drawn.append(y) or original(self, y))

    async def steps(app, pilot):
        await pilot.press("enter")
        await pilot.pause()
        drawn.clear()
        await pilot.press(*["pagedown"] * 30)
        await pilot.pause()
        view = app.screen.query_one(TokenText)
        assert view.token > 300
        assert 0 < len(drawn) <= 3 * 31 * view.size.height
        assert max(drawn) < view.size.height

    drive(steps, traces=[trace(f"{i}", 8000, seed=i) for i in range(3)])


def test_plain_text_has_everything_and_no_escapes():
    file = io.StringIO()
    print_traces(TRACES, title="t[bold]\x07", facts={"model": "\x1b[0m"}, file=file)
    text = file.getvalue()
    assert not any(ord(character) < 32 and character != "\n" for character in text)
    assert not set("\x7f\x9b\u202e\u2028") & set(text)
    for expected in (
        "t[bold]␇",
        "model: ␛[0m",
        "[red]second␛[0m",
        "error: missing field: completion is ␛[31mnull",
        "│ What is 3 + 4?",
        "task: sum",
        "importance, in nats",
        "most repeated unprotected tokens, times",
        "reward against length, tokens",
        f"reward 0.500 · 100 tokens, 20 protected · entropy {TRACES[0].scores.entropy:.2f} nats",
    ):
        assert expected in text
    assert text.count("«") == text.count("»") >= 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31m", "␛[31m"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\x07\x7f\x85", "␇␡<U+0085>"),
        ("\u202eabc", "<U+202E>abc"),
        ("\ud800", "<U+D800>"),
        ("日本 é 🙂 [bold]", "日本 é 🙂 [bold]"),
    ],
)
def test_visible(text, expected):
    assert visible(text) == expected


@pytest.mark.parametrize("width", [1, 2, 7, 40, 200])
def test_wrapped_lines_hold_all_tokens_in_order_within_the_width(width):
    pieces = trace("x", 400).pieces
    lines = wrapped(pieces, width)
    assert [span.token for line in lines for span in line] == sorted(span.token for line in lines for span in line)
    assert {span.token for line in lines for span in line} == set(range(400))
    assert "".join(span.text for line in lines for span in line) == visible("".join(pieces))
    for line in lines:
        column = 0
        for span in line:
            assert span.column == column
            assert span.width == cell_len(span.text)
            column += span.width
        # A newline's sign may stand behind the last cell's word; a character of two cells does not fit one.
        assert column <= max(width, 2)


def test_words_are_not_broken_where_they_fit():
    lines = wrapped([" re", "verify", " it", "\n", " all"], 10)
    assert [[span.text for span in line] for line in lines] == [[" re", "verify"], [" it", "↵"], [" all"]]


def test_column_chart_is_of_means_within_its_width():
    lines = column_chart([0.0] * 50 + [1.0] * 50, 59, 6, label="value, units", axis="token")
    assert max(map(len, lines)) <= 59
    assert lines[0] == "value, units; mean of 2 tokens a column"
    assert lines[1] == "       1 " + " " * 25 + "█" * 25
    assert lines[-2] == "       0 " + "▁" * 25 + "█" * 25
    assert lines[-1].split() == ["1", "token", "100"]
    assert column_chart([], 50, 6, label="value", axis="token") == ["value: none"]


def test_bars_are_in_proportion():
    lines = bars([Repeated(" the", 8, 0), Repeated("\n", 4, 1)], 60, label="times")
    assert lines[1:] == ["8 " + "█" * 20 + " “ the”", "4 " + "█" * 10 + " " * 10 + " “↵”"]


def test_scatter_puts_points_at_their_places():
    lines = scatter([(0, 0.0), (100, 1.0)], 29, 7, x="length", y="reward", marked=1)
    assert lines[1] == "       1 " + " " * 19 + "◆"
    assert lines[5] == "       0 ⡀" + " " * 19
    assert lines[6] == " " * 9 + "0" + " " * 16 + "100"
    assert len(scatter([(5, 0.5)], 29, 7, x="length", y="reward")) == 7, "one point has no extent"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", True),
        ("FIRST task: sum", True),
        ("reward<0.6 reward>=.5 tokens=100", True),
        ("reward<0.5", False),
        ("entropy>99", False),
        ("repeated>10 repeated<100", True),
        ("error", False),
        ("nothing", False),
    ],
)
def test_filter(wanted, expected):
    scores = TRACES[0].scores
    numbers = {"reward": 0.5, "tokens": 100.0, "entropy": scores.entropy, "repeated": 100 * scores.repeated_share}
    assert matches(TRACES[0], numbers, wanted) is expected


def test_filter_of_a_trace_with_an_error():
    assert matches(TRACES[2], {}, "error")
    assert matches(TRACES[2], {}, "missing")
    assert not matches(TRACES[2], {}, "reward<1")
