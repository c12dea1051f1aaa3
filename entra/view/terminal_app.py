"""The full-screen program: a list of traces, and one trace or two of one prompt with every token to look at.

Only what is on the screen is drawn: the text of a trace is laid out once for a width, and its lines are made when they are
shown. Shades of importance are classes with about as many tokens of the trace in each. Protected tokens are bold and
underlined, so that colour is never all that tells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.geometry import Region, Size
from textual.message import Message
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import DataTable, Footer, Input, Static

from entra.view.filtering import matches
from entra.view.lines import COLUMNS, about, charts, marks, rewards_chart, row_of, summary, token_facts
from entra.view.trace import Trace
from entra.view.visible import visible
from entra.view.wrapping import Span, wrapped

_SHADES = {
    True: ("#ececec", ("#121212", "#2a2410", "#41370f", "#5a4a0d", "#745d00")),
    False: ("#101010", ("#ffffff", "#fff6d6", "#ffeaa3", "#ffdb66", "#ffc81f")),
}
"""Text and backgrounds from the lowest to the highest importance, in the dark and the light theme."""
_SAME = {True: "#1f4f7a", False: "#b8dcff"}
"""Background of the tokens that are equal to the one under the cursor."""
_DIM = {True: "#9a9a9a", False: "#5a5a5a"}


class TokenText(ScrollView):
    """A trace's prompt and tokens, with a cursor on one token."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Token", key_display="←→"),
        Binding("right", "step(1)", show=False),
        Binding("up", "line(-1)", "Line", key_display="↑↓"),
        Binding("down", "line(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "to(0)", show=False),
        Binding("end", "to(-1)", show=False),
        Binding("m", "mark(1)", "Mark", key_display="m M"),
        Binding("M", "mark(-1)", show=False),
        Binding("n", "equal(1)", "Equal", key_display="n N"),
        Binding("N", "equal(-1)", show=False),
    ]
    DEFAULT_CSS = "TokenText { overflow-y: scroll; overflow-x: hidden; height: 1fr; }"

    class Looked(Message):
        """A token is under the cursor or the mouse."""

        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

    class Moved(Message):
        """The cursor is on another token."""

        def __init__(self, trace: Trace, token: int) -> None:
            super().__init__()
            self.trace, self.token = trace, token

    def __init__(self, trace: Trace, token: int) -> None:
        super().__init__()
        self.trace = trace
        self.token = token
        """Under the cursor."""
        self._head: list[str] = []
        self._lines: list[list[Span]] = []
        self._line_of: list[int] = []
        self._shade: list[int] = []
        self._marks = marks(trace.protected)
        self._width = 0

    def on_mount(self) -> None:
        ordered = sorted(self.trace.importance)
        edges = [ordered[i * len(ordered) // 5] for i in range(1, 5)] if ordered else []
        self._shade = [bisect_right(edges, value) for value in self.trace.importance]

    def on_resize(self) -> None:
        width = self.scrollable_content_region.width
        if width > 0 and width != self._width:
            self._lay_out(width)
        if self._lines:  # below a long prompt, and beside charts that have come, the cursor can be seen
            line = len(self._head) + self._line_of[self.token]
            if not 0 <= line - self.scroll_offset.y < self.size.height:
                self.scroll_to(y=max(0, line - self.size.height * 2 // 3), animate=False, force=True)

    def _lay_out(self, width: int) -> None:
        self._width = width
        head = [line for text in about(self.trace) for line in Text(text).wrap(self.app.console, width)]
        self._head = [line.plain for line in head] + [""]
        self._lines = wrapped(self.trace.pieces, width) if self.trace.pieces else []
        self._line_of = [0] * len(self.trace.pieces)
        for number in range(len(self._lines) - 1, -1, -1):
            for span in self._lines[number]:
                self._line_of[span.token] = number
        self.virtual_size = Size(width, len(self._head) + len(self._lines))
        self.refresh()

    def render_line(self, y: int) -> Strip:
        number = self.scroll_offset.y + y
        dark = self.app.current_theme.dark
        colour, backgrounds = _SHADES[dark]
        plain = Style(color=colour, bgcolor=backgrounds[0])
        if number < len(self._head):
            segments = [Segment(self._head[number], Style(color=_DIM[dark], bgcolor=backgrounds[0]))]
        elif number - len(self._head) < len(self._lines):
            spans = self._lines[number - len(self._head)]
            segments = [Segment(span.text or "·" * (span.token == self.token), self._style(span.token, dark)) for span in spans]
        else:
            segments = []
        return Strip(segments).adjust_cell_length(self._width, plain)

    def _style(self, token: int, dark: bool) -> Style:
        colour, backgrounds = _SHADES[dark]
        same = self.trace.token_ids[token] == self.trace.token_ids[self.token]
        protected = bool(self._marks[token])
        return Style(
            color=colour,
            bgcolor=_SAME[dark] if same else backgrounds[self._shade[token]],
            bold=protected,
            underline=protected,
            italic=same,
            reverse=token == self.token,
        )

    def action_step(self, by: int) -> None:
        self.look(self.token + by)

    def action_line(self, by: int) -> None:
        if not self._lines:
            self.scroll_relative(y=by, animate=False)
            return
        here = self._line_of[self.token]
        if by < 0 and here == 0:
            self.scroll_relative(y=by, animate=False)  # to the prompt
            return
        column = next(span.column for span in self._lines[here] if span.token == self.token)
        target = min(max(here + by, 0), len(self._lines) - 1)
        while 0 < target < len(self._lines) - 1 and not self._lines[target]:
            target += 1 if by > 0 else -1
        if self._lines[target]:
            self.look(self._at(target, column).token)

    def action_page(self, by: int) -> None:
        self.action_line(by * max(1, self.size.height - 2))

    def action_to(self, token: int) -> None:
        self.look(token % max(1, len(self.trace.pieces)))

    def action_equal(self, by: int) -> None:
        ids = self.trace.token_ids
        for step in range(1, len(ids) + 1):
            token = (self.token + by * step) % len(ids)
            if ids[token] == ids[self.token]:
                self.look(token)
                return

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys for marks are there where marks are."""
        return action != "mark" or bool(self.trace.marked)

    def action_mark(self, by: int) -> None:
        starts = [mark.first for mark in self.trace.marked][::by]
        self.look(next((start for start in starts if (start - self.token) * by > 0), starts[0]))

    def look(self, token: int) -> None:
        """Put the cursor on a token and show it."""
        if not self.trace.pieces:
            return
        self.token = min(max(token, 0), len(self.trace.pieces) - 1)
        if self._line_of:
            line = self._line_of[self.token] + len(self._head)
            self.scroll_to_region(Region(0, line, 1, 1), animate=False, force=True)
        self.refresh()
        self.post_message(self.Looked(self.token))
        self.post_message(self.Moved(self.trace, self.token))

    def _at(self, line: int, column: int) -> Span:
        spans = self._lines[line]
        return spans[max(0, bisect_right([span.column for span in spans], column) - 1)]

    def _under(self, event: events.MouseEvent) -> int | None:
        offset = event.get_content_offset(self)
        line = -1 if offset is None else self.scroll_offset.y + offset.y - len(self._head)
        if offset is None or not 0 <= line < len(self._lines) or not self._lines[line]:
            return None
        span = self._at(line, offset.x)
        return span.token if offset.x < span.column + span.width else None

    def on_mouse_move(self, event: events.MouseMove) -> None:
        token = self._under(event)
        self.post_message(self.Looked(self.token if token is None else token))

    def on_leave(self) -> None:
        self.post_message(self.Looked(self.token))

    def on_click(self, event: events.Click) -> None:
        token = self._under(event)
        if token is not None:
            self.look(token)


class Drawn(Static):
    """Lines that are drawn anew for each size that they get."""

    def __init__(self, lines: Callable[[int, int], list[str]], classes: str) -> None:
        super().__init__(classes=classes)
        self._lines = lines

    def on_resize(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Draw the lines for the width and height that there are."""
        width, height = self.content_size
        if width > 0:
            self.update(Text("\n".join(self._lines(width, height)), no_wrap=True))


class TracePane(Vertical):
    """One trace: its name, its tokens, what is known of one of them, its charts."""

    DEFAULT_CSS = """
    TracePane { width: 1fr; }
    TracePane .name { height: 1; text-style: bold; background: $panel; }
    TracePane .facts { height: 3; background: $panel; }
    TracePane.narrow .facts { height: 5; }
    TracePane.marked .facts { height: 4; }
    TracePane.marked.narrow .facts { height: 6; }
    TracePane VerticalScroll { height: auto; max-height: 50%; border-top: solid $panel; display: none; overflow-y: scroll; }
    TracePane VerticalScroll:focus { border-top: solid $primary; }
    TracePane VerticalScroll.shown { display: block; }
    TracePane:focus-within .name { background: $primary; color: $text; }
    """

    def __init__(self, trace: Trace, token: int) -> None:
        super().__init__()
        self.trace = trace
        self._token = token

    def compose(self) -> ComposeResult:
        yield Static(Text(visible(self.trace.name)), classes="name")
        yield TokenText(self.trace, self._token)
        yield Static(classes="facts")
        with VerticalScroll():
            yield Drawn(lambda width, _: charts(self.trace, max(20, width)), classes="charts")

    def on_mount(self) -> None:
        self.set_class(bool(self.trace.marked), "marked")
        self.facts(self._token)

    def on_resize(self) -> None:
        self.set_class(self.size.width < 80, "narrow")

    @on(TokenText.Looked)
    def _looked(self, message: TokenText.Looked) -> None:
        self.facts(message.token)

    def facts(self, token: int) -> None:
        """Show what is known of a token."""
        lines = token_facts(self.trace, token) if self.trace.error is None else [summary(self.trace)]
        self.query_one(".facts", Static).update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))

    def show_charts(self, shown: bool) -> None:
        """Show the charts, or the text alone."""
        self.query_one(VerticalScroll).set_class(shown and self.trace.error is None, "shown")


class TraceScreen(Screen[None]):
    """One trace, or two of one prompt side by side."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "app.pop_screen", "List"),
        Binding("c", "charts", "Charts"),
        Binding("v", "beside", "Beside"),
        Binding("right_square_bracket", "go(1)", "Trace", key_display="[ ]"),
        Binding("left_square_bracket", "go(-1)", show=False),
    ]

    def __init__(self, traces: Sequence[Trace], number: int) -> None:
        super().__init__()
        self._traces = traces
        self._shown = [number]
        self._charts = False
        self._tokens: dict[int, int] = {}
        """Where the cursor was in a trace."""

    def compose(self) -> ComposeResult:
        yield Horizontal()
        yield Footer(compact=True)

    async def on_mount(self) -> None:
        await self._show()

    async def _show(self) -> None:
        holder = self.query_one(Horizontal)
        await holder.remove_children()
        panes = (TracePane(self._traces[number], self._tokens.get(number, 0)) for number in self._shown)
        await holder.mount(*panes)
        for pane in self.query(TracePane):
            pane.show_charts(self._charts)
        self.query(TokenText).first().focus()

    @on(TokenText.Moved)
    def _moved(self, message: TokenText.Moved) -> None:
        number = next(i for i in self._shown if self._traces[i] is message.trace)
        self._tokens[number] = message.token

    def action_charts(self) -> None:
        self._charts = not self._charts
        for pane in self.query(TracePane):
            pane.show_charts(self._charts)

    async def action_go(self, by: int) -> None:
        self._shown = [(self._shown[0] + by) % len(self._traces)]
        await self._show()

    async def action_beside(self) -> None:
        """Another trace of the prompt, then the next one, then none."""
        first = self._shown[0]
        prompt = self._traces[first].prompt
        others = [i for i, trace in enumerate(self._traces) if trace.prompt == prompt and i != first]
        if not others:
            self.app.notify("no other trace has this prompt", markup=False)
            return
        after = others.index(self._shown[1]) + 1 if len(self._shown) > 1 else 0
        self._shown = [first, others[after]] if after < len(others) else [first]
        await self._show()


class TraceTable(DataTable[Text]):
    """The list."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Open")]


class ListScreen(Screen[None]):
    """All traces, to sort, filter and open."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("escape", "table", show=False),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("c", "chart", "Chart"),
    ]
    DEFAULT_CSS = """
    ListScreen .title { height: auto; max-height: 3; background: $panel; }
    ListScreen DataTable { height: 1fr; }
    ListScreen .chart { height: 40%; max-height: 14; border-top: solid $panel; display: none; }
    ListScreen .chart.shown { display: block; }
    """

    def __init__(self, traces: Sequence[Trace], title: str, facts: Mapping[str, str]) -> None:
        super().__init__()
        self._traces = traces
        self._heading = " · ".join([visible(title), *(f"{visible(k)}: {visible(v)}" for k, v in facts.items() if v != title)])
        self._column: int | None = None
        self._reverse = False
        self._order: list[int] = []
        self._numbers = [_numbers(trace) for trace in traces]

    def compose(self) -> ComposeResult:
        yield Static(Text(self._heading), classes="title")
        yield Input(placeholder="filter: words, and reward<0.5 tokens>800 entropy<4 repeated>50 error")
        yield TraceTable(cursor_type="row", zebra_stripes=True)
        yield Drawn(self._chart, classes="chart")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        table = self.query_one(DataTable)
        table.add_columns(*(Text(name) for name in (*COLUMNS, "prompt, or what is wrong")))
        self._fill()
        table.focus()
        if self.size.height >= 36:
            self.action_chart()

    def _fill(self) -> None:
        """The rows that pass the filter, in order; the cursor stays on its trace."""
        table = self.query_one(DataTable)
        before = self._order[table.cursor_row] if table.is_valid_row_index(table.cursor_row) else None
        wanted = self.query_one(Input).value
        order = [i for i, trace in enumerate(self._traces) if matches(trace, self._numbers[i], wanted)]
        if self._column is not None:
            order.sort(key=self._key, reverse=self._reverse)
        elif self._reverse:
            order.reverse()
        self._order = order
        table.clear()
        for i in order:
            trace = self._traces[i]
            first = trace.error if trace.error is not None else " ".join(trace.prompt.split())
            cells = row_of(trace)
            name = Text(cells[0], no_wrap=True, overflow="ellipsis")
            name.truncate(40, overflow="ellipsis")
            note = Text(visible(first[:200]), style="bold" if trace.error is not None else "")
            table.add_row(name, *(Text(cell, justify="right") for cell in cells[1:]), note, key=str(i))
        if before in order:
            table.move_cursor(row=order.index(before), animate=False)
        self._draw()

    def _key(self, i: int) -> tuple[bool, Any]:
        """Traces without the number come last, whichever way is sorted."""
        value: Any = self._traces[i].name.casefold() if self._column == 0 else self._numbers[i].get(_NAMES[self._column or 0])
        if self._column == 5:
            value = self._traces[i].error or self._traces[i].prompt
        return ((value is None) != self._reverse, value if value is not None else 0)

    @on(DataTable.RowSelected)
    def _open(self) -> None:
        table = self.query_one(DataTable)
        if table.is_valid_row_index(table.cursor_row):
            self.app.push_screen(TraceScreen(self._traces, self._order[table.cursor_row]))

    @on(DataTable.HeaderSelected)
    def _header(self, event: DataTable.HeaderSelected) -> None:
        self._reverse = not self._reverse if self._column == event.column_index else False
        self._column = event.column_index
        self._fill()

    @on(DataTable.RowHighlighted)
    def _highlighted(self) -> None:
        self._draw()

    @on(Input.Changed)
    def _filtered(self) -> None:
        self._fill()

    @on(Input.Submitted)
    def action_table(self) -> None:
        self.set_focus(self.query_one(DataTable))

    def action_filter(self) -> None:
        self.set_focus(self.query_one(Input))

    def action_sort(self) -> None:
        self._column = 0 if self._column is None else (self._column + 1) % (len(COLUMNS) + 1)
        self._fill()
        name = (*COLUMNS, "prompt")[self._column]
        self.app.notify(f"sorted by {name}" + (", falling" if self._reverse else ", rising"), timeout=2, markup=False)

    def action_reverse(self) -> None:
        self._reverse = not self._reverse
        self._fill()

    def action_chart(self) -> None:
        self.query_one(Drawn).toggle_class("shown")

    def _draw(self) -> None:
        self.query_one(Drawn).draw()

    def _chart(self, width: int, height: int) -> list[str]:
        """Reward against length of the rows in the list."""
        table = self.query_one(DataTable)
        good = [i for i in self._order if self._traces[i].reward is not None]
        here = self._order[table.cursor_row] if table.is_valid_row_index(table.cursor_row) else None
        marked = good.index(here) if here in good else None
        return rewards_chart([self._traces[i] for i in good], width, height, marked)


class Inspector(App[None]):
    """`entra inspect --terminal`."""

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("d", "theme", "Theme"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, traces: Sequence[Trace], *, title: str, facts: Mapping[str, str]) -> None:
        super().__init__()
        self._list = ListScreen(traces, title, facts)

    def on_mount(self) -> None:
        self.push_screen(self._list)

    def action_theme(self) -> None:
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"
        for text in self.screen.query(TokenText):
            text.refresh()


_NAMES = ("", "reward", "tokens", "entropy", "repeated")


def _numbers(trace: Trace) -> dict[str, float]:
    """What a filter can ask of a trace, and a list is sorted by."""
    if trace.reward is None or trace.error is not None:
        return {}
    return {
        "reward": trace.reward,
        "tokens": float(len(trace.token_ids)),
        "entropy": trace.scores.entropy,
        "repeated": 100 * trace.scores.repeated_share,
    }
