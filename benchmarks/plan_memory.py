"""Is the memory that `lowbit plan` predicts the memory that `lowbit quantize` takes?

    python benchmarks/plan_memory.py --model llama-30m --recipes "awq+gptq:int4-g64;tune:int4-g64,steps=8"

Each recipe is planned, then run in a process of its own whose highest resident set is read at its end. Text: pydoc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

RECIPES = [
    "rtn:int4-g64", "hqq:int4-g64-z16", "gptq:int4-g64", "awq+rtn:int4-g64", "awq+clip+gptq:int4-g64",
    "smoothquant+rtn:int8-row-sym+a:int8-token",
    "rotate+gptq:int4-g64", "qllm+rtn:int4-g64+a:int8-token", "lowrank:int4-g64,rank=16", "outliers:int3-g64,share=1.0",
    "llmint8:int8-row-sym", "tune:int4-g64,steps=0", "tune:int4-g64,steps=4", "gptq:ec3",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default=";".join(RECIPES))
    parser.add_argument("--samples", default="32")
    parser.add_argument("--length", default="512")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    options = ["--samples", arguments.samples, "--length", arguments.length, "--dtype", arguments.dtype]
    for recipe in arguments.recipes.split(";"):
        said = subprocess.run(
            [*_LOWBIT, "plan", arguments.model, recipe, *options, "--json"], check=True, capture_output=True, text=True
        )
        predicted = json.loads(said.stdout)["peak"]
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [*_LOWBIT, "quantize", arguments.model, recipe, *options, "-o", f"{folder}/out"],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            _, status, used = os.wait4(process.pid, 0)
        row = {"model": arguments.model, "recipe": recipe, "predicted": predicted, "measured": used.ru_maxrss * 1024,
               "ratio": round(predicted / (used.ru_maxrss * 1024), 3), "status": status}  # fmt: skip
        print(json.dumps(row), flush=True)


_LOWBIT = [sys.executable, "-m", "lowbit.cli"]

if __name__ == "__main__":
    main()
