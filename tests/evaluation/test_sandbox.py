"""Generated code passes by running to its end, and gets nothing but a processor for a moment."""

from __future__ import annotations

import pytest

from lowbit.evaluation import sandbox

CASES = {
    "import math, collections; assert math.comb(4, 2) == 6": "passed",
    "assert 1 == 2": "failed",
    "import os; os._exit(0)": "failed",  # leaving early is no success
    "while True: pass": "timed out",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "failed",
    "x = bytearray(3 << 30)": "failed",
    "open('big', 'wb').write(bytes(2 << 20))": "failed",
    "import os; os.fork()": "failed",
    "import os; assert os.listdir() == ['program'] and 'HOME' not in os.environ": "passed",
}


@pytest.mark.parametrize("program", CASES)
def test_how_a_program_ends(program: str) -> None:
    assert sandbox.run(program, seconds=0.6 if "while" in program else 10.0).how == CASES[program]


def test_it_says_how_the_network_is_closed() -> None:
    assert sandbox.isolation() in ("network namespace", "sockets refused")
