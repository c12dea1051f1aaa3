"""`make gpu-test`: the tests that need a GPU, in parallel processes because most of their time is compilation, then the
sanitizer. Runs all parts, then exits with 1 if any failed. Five files in the folder of results (summary.txt alone where no
test could be collected):

- tests.xml (JUnit) and tests.log of all processes,
- memcheck.log and racecheck.log, or the reason why there is none,
- summary.txt, one line per part.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZED = ROOT / "tests/entra_kernels/sanitize.py"
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


def collect(selection: list[str]) -> list[str]:
    """Node ids of the tests that `selection` means."""
    command = [sys.executable, "-m", "pytest", *selection, "--collect-only", "-q"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ids = [line for line in found.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if found.returncode != 0 or not ids:
        raise SystemExit(f"no tests were collected:\n{found.stdout[-3000:]}{found.stderr[-3000:]}")
    return ids


def run_tests(ids: list[str], results: Path, seconds: float) -> list[str]:
    """What became of the tests; every process gets each WORKERS-th. One more runs the sanitizer's script without the
    sanitizer, which compiles its kernels meanwhile."""
    deadline = time.monotonic() + seconds
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as scratch:
        reports = [Path(scratch) / f"{index}.xml" for index in range(WORKERS)]
        commands = [["-m", "pytest", "-v", f"--junitxml={report}"] for report in reports]
        commands = [[*command, *mine] for index, command in enumerate(commands) if (mine := ids[index::WORKERS])]
        commands.append([str(SANITIZED)])
        running: list[tuple[subprocess.Popen[bytes], Path]] = []
        for index, command in enumerate(commands):
            log = Path(scratch) / f"{index}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            running.append((process, log))

        def save_logs() -> None:
            (results / "tests.log").write_bytes(b"\n".join(log.read_bytes() for _, log in running))

        while any(process.poll() is None for process, _ in running) and time.monotonic() < deadline:
            time.sleep(1)
            save_logs()
        late = [process for process, _ in running if process.poll() is None]
        for process in late:
            process.send_signal(signal.SIGINT)  # pytest then still writes its report
        for process in late:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        save_logs()
        suites = ET.Element("testsuites")
        for report in reports:
            try:
                suites.extend(ET.parse(report).getroot().iter("testsuite"))
            except (OSError, ET.ParseError):
                continue  # killed before it was written: its process counts as failed
    ET.ElementTree(suites).write(results / "tests.xml", encoding="utf-8")
    count = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    *tests, script = (process.returncode == 0 for process, _ in running)
    ran = ", ".join(f"{value} {name}" for name, value in count.items())
    return [
        f"tests: {'passed' if all(tests) else 'FAILED'}: {ran}, of {len(ids)}{'; out of time' if late else ''}",
        f"{SANITIZED.name} without a sanitizer: {'passed' if script else 'FAILED'}",
    ]


def sanitize(tool: str, results: Path, seconds: float) -> str:
    log = results / f"{tool}.log"
    program = shutil.which("compute-sanitizer")
    if program is None:
        log.write_text("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit\n")
        return f"{tool}: not run: compute-sanitizer is not on the PATH"
    # With the caching allocator every access within a 2 MiB block looks fine.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SANITIZED)]
    with log.open("wb") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{tool}: not finished in {seconds:.0f} s, no error until then is claimed; see the log"
    return f"{tool}: {'passed' if code == 0 else f'FAILED with exit code {code}'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder for the five files")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together")
    parser.add_argument("selection", nargs=argparse.REMAINDER, help="arguments for pytest; default: tests -m gpu")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    summary = arguments.results / "summary.txt"
    try:
        ids = collect(arguments.selection or ["tests", "-m", "gpu"])
    except SystemExit as error:
        summary.write_text(f"tests: FAILED: {error}\n")
        raise
    lines = run_tests(ids, arguments.results, 60 * (arguments.minutes - 2))
    summary.write_text("\n".join(lines) + "\n")
    for tool, left in (("memcheck", 2), ("racecheck", 1)):
        lines.append(sanitize(tool, arguments.results, (end - time.monotonic()) / left))
        summary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any("FAILED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
