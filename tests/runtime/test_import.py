"""``import lowbit`` is cheap, and teaches transformers to read native checkpoints whenever it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_neither_torch_nor_transformers_and_costs_little() -> None:
    code = """
import sys, time
before = time.process_time()
import lowbit
print(time.process_time() - before)
print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy', 'pyarrow'}))
print(lowbit.__version__, callable(lowbit.LowbitError), hasattr(lowbit, 'nonsense'))
"""
    seconds, heavy, rest = run(code).splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.5
    assert rest == "0.1.0 True False"


ORDERS = {
    "lowbit first": "import lowbit\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM, PreTrainedModel\nimport lowbit",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_transformers_reads_a_checkpoint_in_a_fresh_interpreter(imports: str, checkpoint: Path) -> None:
    code = f"""
import os
os.environ['HF_HUB_OFFLINE'] = '1'
{imports}
import inspect, sys, torch
model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}, dtype=torch.float32)
from lowbit.runtime.linear import QLinear
print(sum(isinstance(module, QLinear) for module in model.modules()))
print('class PreTrainedModel' in inspect.getsource(sys.modules['transformers.modeling_utils']))
"""
    assert run(code).split() == ["14", "True"]
