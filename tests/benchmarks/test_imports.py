"""Who may import whom: the package knows nothing of what measures it, and what measures it calls no command line."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(folder):
    """(file, module) for every import in a folder, also inside functions; of `from a import b` both a and a.b."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {(path.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found |= {(path.name, name) for alias in node.names for name in (node.module, f"{node.module}.{alias.name}")}
    return found


def within(module, package):
    return module == package or module.startswith(f"{package}.")


def test_benchmarks_call_no_command_line():
    found = imported("benchmarks")
    assert [pair for pair in found if within(pair[1], "entra.cli")] == []
    assert ("__main__.py", "entra.commands.CommandError") in found


def test_the_package_imports_neither_benchmarks_nor_tests():
    for package in ("entra", "entra_kernels"):
        found = imported(package)
        assert [pair for pair in found if within(pair[1], "benchmarks") or within(pair[1], "tests")] == []
        assert any(within(module, "torch") for _, module in found)
