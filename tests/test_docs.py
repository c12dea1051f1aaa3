"""The pages, without the environment of `make docs`: links lead somewhere, public names are documented and shown."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOKS = runpy.run_path(str(ROOT / ".ci/mkdocs_hooks.py"))
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("entra/data/*.md")})
NAVIGATION = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / ".ci/mkdocs.yml").read_text(), re.MULTILINE)


def links_of(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http:", "https:"))]


def anchors_of(page):
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_pages_of_the_site_are_all_pages_of_docs():
    assert {path for path in NAVIGATION if path.startswith("docs/")} == {
        page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md")
    }
    assert {"README.md", "CONTRIBUTING.md", "benchmarks/README.md"} <= set(NAVIGATION)


def test_every_public_name_has_a_docstring_and_a_page():
    assert HOOKS["undocumented"]() == []


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one module with a function that is documented and shown, and what a test adds to it."""
    monkeypatch.setitem(HOOKS["undocumented"].__globals__, "ROOT", tmp_path)
    monkeypatch.setitem(HOOKS["undocumented"].__globals__, "PACKAGES", ("some",))
    (tmp_path / "docs/api").mkdir(parents=True)
    (tmp_path / "some").mkdir()

    def write(names, code, page):
        (tmp_path / "some/__init__.py").write_text(f"from .inner import {', '.join(names)}\n__all__ = {names}\n")
        (tmp_path / "some/inner.py").write_text(code)
        (tmp_path / "docs/api/some.md").write_text(page)
        return HOOKS["undocumented"]()

    return write


GOOD = 'def good():\n    """Documented."""\n'


def test_a_public_name_without_a_docstring_is_found(package):
    assert package(["good"], GOOD, "::: some.good\n") == []
    assert package(["good", "bad"], f"{GOOD}def bad(): pass\n", "::: some.good\n\n::: some.bad\n") == [
        "some.inner.bad has no docstring"
    ]


def test_a_public_name_without_a_page_is_found(package):
    assert package(["good"], GOOD, "") == ["some.inner.good is public but stands on no page of docs/api"]


@pytest.mark.parametrize("gone", ["some.gone", "some.gone.good"])
def test_a_page_that_shows_what_does_not_exist_is_found(package, gone):
    with pytest.raises(ValueError, match=rf"{gone} does not exist; correct docs/api"):
        package(["good"], GOOD, f"::: some.good\n\n::: {gone}\n")


def test_fields_and_methods_need_docstrings_but_for_private_ones(package):
    fields = 'class Box:\n    """Documented."""\n    a: int\n    """One."""\n    b: int\n    _c: int\n'
    code = f"{fields}    def d(self): ...\n    def _e(self): ...\n"
    assert package(["Box"], code, "::: some.Box\n") == [f"some.inner.Box.{name} has no docstring" for name in "bd"]


def test_of_an_overloaded_function_the_last_definition_counts(package):
    assert package(["good"], f"@overload\ndef good(a: int): ...\n{GOOD}", "::: some.good\n") == []


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/a.js">',
        "<link href=//fonts.example/a.css rel=stylesheet>",
        '<img alt="" src="http://a.b/c.png">',
    ],
)
def test_what_a_page_loads_from_the_network_is_found(tag):
    assert HOOKS["LOADED"].search(tag)
    assert not HOOKS["LOADED"].search(re.sub(r"(https?:)?//[^/]*/", "assets/", tag))
    assert not HOOKS["LOADED"].search('<a href="https://example.org/">')
