"""A full disk leaves the old file: every file that is written at once is written beside it and renamed."""

import contextlib
import signal

import pytest
from shown_traces import scores_of

from entra.view.page import write_page
from entra.view.trace import Trace
from entra.whole_file import write_whole

resource = pytest.importorskip("resource", reason="needs a limit on the size of files, which stands in for a full disk")


@contextlib.contextmanager
def room_for(size):
    """No file can be larger inside: writing ends with an OSError in the middle, as on a disk that becomes full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def a_trace(text):
    return Trace(name=text, prompt="p", pieces=[text], scores=scores_of([1]))


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    write_page([a_trace("old")], path, title="t", config=None)
    before = path.read_bytes()
    with room_for(len(before) // 2), pytest.raises(OSError, match="too large"):
        write_page([a_trace("new")], path, title="t", config=None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no half of a page stays behind"


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    pytest.importorskip("rich")
    from entra.cli import CommandError, demo
    from entra.traces import load_traces

    path = tmp_path / "trace.svg"
    problem = load_traces()[0]
    demo._write_svg(path, problem, [])
    before = path.read_bytes()
    with room_for(len(before) // 2), pytest.raises(CommandError, match=r"cannot write --svg .*too large"):
        demo._write_svg(path, problem, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_parts_are_written_in_order_and_a_link_stays_a_link(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link.txt"
    write_whole(path, "old")
    link.symlink_to(path)
    write_whole(link, iter(["n", "e", "w"]), encoding="ascii")
    assert link.is_symlink()
    assert path.read_text(encoding="ascii") == "new"
