"""What `make docs` adds to mkdocs: pages from the whole repository, and checks. The build is strict, so a warning fails it.

The tests call `undocumented` without mkdocs, so only the standard library is imported at the top.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PACKAGES = ("entra", "entra_kernels")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//""")
log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> None:
    """An undocumented public name."""
    for name in undocumented():
        log.warning(name)


def on_files(files: Any, config: Any) -> None:
    """The pages of the navigation and the files that they link to, each where it lies in the repository."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = list(leaves(config.nav))
    shown = {
        (ROOT / page).parent.joinpath(link).resolve().relative_to(ROOT).as_posix()
        for page in pages
        for link in LINK.findall((ROOT / page).read_text())
        if not link.endswith(".md")
    }
    for path in [*pages, *sorted(shown)]:
        if (ROOT / path).is_file():  # where it is not, mkdocs names the link
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "wide.css", content=".md-grid { max-width: 76rem; }"))  # code of 128 columns


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Tables inside <details> are Markdown on GitHub; here they need the attribute."""
    return markdown.replace("<details>", '<details markdown="1">')


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """A page that loads something from the network."""
    for tag in LOADED.findall(output):
        log.warning("%s loads from the network: %s", page.file.src_uri, tag)


def leaves(nav: Any) -> Iterator[str]:
    """The pages of mkdocs' navigation, a tree of lists and mappings."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def undocumented() -> list[str]:
    """What is wrong with the API reference, a sentence each: public names without a docstring or without a page."""
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    shown = {defined(name) for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
    public = {defined(f"{package}.{name}") for package in PACKAGES for name in names_in_all(package)}
    missing = [f"{name} is public but stands on no page of docs/api" for name in sorted(public - shown)]
    return missing + [f"{name} has no docstring" for name in sorted(public | shown) for name in without_docstring(name)]


def names_in_all(package: str) -> list[str]:
    for node in statements_of(package):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package} has no __all__; add one")


def defined(name: str) -> str:
    """The name under which a function or class is defined, of one under which it can be imported."""
    module, _, own = name.rpartition(".")
    for node in statements_of(module):
        if isinstance(node, Definition) and node.name == own:
            return name
        if isinstance(node, ast.ImportFrom) and own in [alias.name for alias in node.names]:
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package(module)] if node.level else []
            return defined(".".join([*base, *filter(None, [node.module]), own]))
    raise ValueError(f"{name} does not exist; correct docs/api")


def without_docstring(name: str) -> list[str]:
    """Of a function: itself. Of a class: itself, its public methods and its fields, whose docstring is a string below them."""
    module, _, own = name.rpartition(".")
    # Overloads come before the definition that counts.
    node = [node for node in statements_of(module) if isinstance(node, Definition) and node.name == own][-1]
    found = [] if ast.get_docstring(node) else [name]
    if isinstance(node, ast.ClassDef):
        for member, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(member, Definition):
                documented, member_name = ast.get_docstring(member), member.name
            elif isinstance(member, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                member_name = ast.unparse(member.target)
            else:
                continue
            if not documented and not member_name.startswith("_"):
                found.append(f"{name}.{member_name}")
    return found


def is_package(module: str) -> bool:
    return ROOT.joinpath(*module.split(".")).is_dir()


def statements_of(module: str) -> list[ast.stmt]:
    """Those at the top of a module, and those in its `if TYPE_CHECKING:`. None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if is_package(module) else path.with_suffix(".py")
    body = ast.parse(file.read_text()).body if file.is_file() else []
    return [inner for node in body for inner in (node.body if isinstance(node, ast.If) else [node])]
