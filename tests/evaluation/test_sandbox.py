"""Generated code passes by running to its end, and gets nothing but a processor for a moment."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lowbit.evaluation import sandbox

_SAYS_IT_PASSED = """
import os, sys
frame, word = sys._getframe(), "passed"
while frame := frame.f_back:
    word = frame.f_locals.get("token", word)
for descriptor in range(3, 32):
    try:
        os.write(descriptor, word.encode())
    except OSError:
        pass
os._exit(0)
"""

CASES = {
    "import math, collections; assert math.comb(4, 2) == 6": "passed",
    "assert 1 == 2": "failed",
    "import os; os._exit(0)": "failed",  # leaving early is no success
    "while True: pass": "timed out",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "failed",
    "x = bytearray(3 << 30)": "failed",
    "open('big', 'wb').write(bytes(2 << 20))": "failed",
    "import os; os.fork()": "failed",
    "import _posixsubprocess": "failed",
    "import sys; sys.modules.pop('subprocess', 0); import subprocess": "failed",
    "open('/dev/null', 'w')": "failed",  # nothing is written outside its folder
    "open('../other', 'a')": "failed",
    "import os; os.open('.', os.O_RDONLY)": "failed",
    "import os; os.remove('program')": "failed",
    "with open('own', 'w') as f: f.write('x')\nassert open('own').read() == 'x'": "passed",
    "import sys; sys.exit(0)": "failed",
    "import sys; sys.excepthook = lambda *_: sys.exit(0); assert False": "failed",
    "import builtins; e = SystemExit; builtins.SystemExit = builtins.BaseException = OSError; raise e": "failed",
    _SAYS_IT_PASSED: "failed",
    "import os; assert os.listdir() == ['program'] and 'HOME' not in os.environ": "passed",
}


@pytest.mark.parametrize("program", CASES)
def test_how_a_program_ends(program: str) -> None:
    assert sandbox.run(program, seconds=0.6 if "while" in program else 10.0).how == CASES[program]


def test_it_says_how_the_network_is_closed() -> None:
    assert sandbox.isolation() in ("network namespace", "sockets refused")


@pytest.mark.parametrize("apart", [True, False])
def test_what_a_program_leaves_behind_is_killed(apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without its hook, which would not let a process start; with and without a namespace of processes."""
    child = tmp_path / "child.py"
    code = sandbox._CHILD.read_text().replace("    sys.addaudithook(refusing(folder))\n", "")
    code = code.replace("(resource.RLIMIT_NPROC, 0), ", "")
    child.write_text(code if apart else code.replace("NEW_USER | NEW_PROCESSES | NEW_NETWORK", "1"))
    monkeypatch.setattr(sandbox, "_CHILD", child)
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    time.sleep(60)\n"
    if sandbox.isolation() == "sockets refused" and apart:
        pytest.skip("the system does not allow namespaces")
    assert sandbox.run(program, seconds=5.0).how == "passed"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(child) in (p.info["cmdline"] or [])]
