"""Help is quick, because nothing heavy is imported for it; and a closed pipe is no error."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ran import Run

COMMANDS = [
    "inspect", "plan", "quantize", "compare", "advise", "export", "import", "convert", "check", "generate", "chat",
    "serve", "doctor", "study run", "study show", "study report", "report", "catalog add", "catalog compare",
]  # fmt: skip


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["study", "run", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    program = f"""
import sys
sys.argv = ["lowbit", *{args!r}]
from lowbit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "numpy", "scipy", "pyarrow", "duckdb", "altair"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lowbit" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    assert f"lowbit {command}" in shown.out


def test_a_reader_that_leaves_is_no_error() -> None:
    program = "import sys, time; time.sleep(0.3); sys.argv = ['lowbit', '--help']; from lowbit.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read()
    process.wait()
    assert complaint == b""
