"""`entra --print-completion`: a shell that runs the script completes commands, options and files."""

import importlib.util
import shutil
import subprocess

import pytest

from entra.cli import COMMANDS, main


def test_without_the_package_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == (
        "entra: --print-completion needs shtab; get it with: pip install 'entra-reward[completion]'\n"
    )


def completed(script, line, folder):
    """What bash offers after TAB at the end of the line."""
    words = line.split(" ")
    call = f"""
source {script}
COMP_WORDS=({" ".join(word or "''" for word in words)}); COMP_CWORD={len(words) - 1}
COMP_LINE='{line}'; COMP_POINT={len(line)}
$(complete -p entra | sed 's/.*-F \\([^ ]*\\).*/\\1/') entra '{words[-1]}' '{words[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    return subprocess.run(["bash", "-c", call], capture_output=True, text=True, cwd=folder, check=True).stdout.split()


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="needs shtab: pip install 'entra-reward[completion]'")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    script = tmp_path / "entra.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "traces.jsonl").touch()
    listed = {name for name, (_, line) in COMMANDS.items() if line is not None}
    assert set(completed(script, "entra ", tmp_path)) == listed
    assert completed(script, "entra score --apply", tmp_path) == ["--apply-chat-template"]
    assert completed(script, "entra eval --corr", tmp_path) == ["--correct-column"]
    assert completed(script, "entra score tra", tmp_path) == ["traces.jsonl"]
