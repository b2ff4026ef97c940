"""The rows of the method table: every method at every width that it is meant for."""

from __future__ import annotations


def _weights(bits: int) -> list[str]:
    """Weight-only recipes at one width, the plainest first."""
    fmt = f"int{bits}-g64"
    rows = [f"rtn:{fmt}", f"rtn:{fmt},clip=20", f"hqq:{fmt}-z16", f"gptq:{fmt}", f"awq+rtn:{fmt}"]
    rows += [f"awq+clip+rtn:{fmt}", f"awq+gptq:{fmt}", f"rotate+gptq:{fmt}", f"outliers:{fmt},share=1.0"]
    rows += [f"lowrank:{fmt},rank=16", f"tune:{fmt},steps=0", f"tune:{fmt}"]
    return rows


GROUPS: dict[str, list[str]] = {
    "W8": ["rtn:int8-row", "rtn:int8-row-sym", "gptq:int8-row", "llmint8:int8-row-sym", "nested:int8-row"],
    "W4": [*_weights(4), "rtn:nf4", "rtn:nf4-dq", "gptq:nf4", "rtn:fp4", "rtn:fp4-e2m1", "rtn:mxfp4", "rtn:nvfp4",
           "rtn:quantile4-g64", "rtn:dynamic4-g64", "series:int2-g64-sym,terms=2", "nested:int8-row,read=4"],
    "W3": [*_weights(3), "nested:int8-row,read=3"],
    "W2": [*_weights(2), "rtn:ternary", "nested:int8-row,read=2", "nested:int8-row,read=2,extra=true"],
    "W8A8": ["rtn:int8-row-sym+a:int8-token", "rtn:int8-row-sym+a:int8-tensor", "rtn:int8-row-sym+a:int8-tensor-static",
             "smoothquant+rtn:int8-row-sym+a:int8-tensor-static",
             "smoothquant,alpha=auto+rtn:int8-row-sym+a:int8-tensor-static", "llmint8:int8-row-sym+a:int8-token-sym",
             "rtn:fp8-e4m3+a:fp8-e4m3-token"],
    "W4A8": ["rtn:int4-g64+a:int8-token", "gptq:int4-g64+a:int8-token", "smoothquant+gptq:int4-g64+a:int8-token",
             "qllm+rtn:int4-g64+a:int8-token"],
    "W4A4": ["rtn:int4-g64+a:int4-token", "smoothquant+rtn:int4-g64+a:int4-token", "qllm+rtn:int4-g64+a:int4-token",
             "rotate+rtn:int4-g64+a:int4-token", "rotate+gptq:int4-g64+a:int4-token",
             "rotate+gptq:int4-g64+a:int4-token+kv:int4-head"],
    "KV8": ["kv:int8-head", "kv:fp8-e4m3-head"],
    "KV4": ["kv:int4-head", "kv:int4-channel32:int4-head", "kv:int4-head,sink=4,window=32"],
    "KV3": ["kv:int3-head", "kv:int3-channel32:int3-head"],
    "KV2": ["kv:int2-head", "kv:int2-channel32:int2-head", "kv:int2-channel32:int2-head,sink=4,window=32"],
}  # fmt: skip
"""Rows by what is rounded: weights (W), their inputs (A), the KV cache (KV), and to how many bits."""

SHORT: dict[str, list[str]] = {
    "W3": ["rtn:int3-g64", "hqq:int3-g64-z16", "gptq:int3-g64", "rotate+gptq:int3-g64", "tune:int3-g64,steps=0",
           "awq+rtn:int3-g64", "lowrank:int3-g64,rank=16", "outliers:int3-g64,share=1.0"],
    "W4": ["rtn:int4-g64", "hqq:int4-g64-z16", "gptq:int4-g64", "rotate+gptq:int4-g64", "awq+rtn:int4-g64",
           "tune:int4-g64,steps=0", "rtn:nf4", "rtn:mxfp4", "rtn:nvfp4", "series:int2-g64-sym,terms=2"],
    "W8A8": ["rtn:int8-row-sym+a:int8-token", "rtn:int8-row-sym+a:int8-tensor-static",
             "smoothquant+rtn:int8-row-sym+a:int8-tensor-static", "llmint8:int8-row-sym+a:int8-token-sym"],
    "W4A4": ["rtn:int4-g64+a:int4-token", "smoothquant+rtn:int4-g64+a:int4-token", "qllm+rtn:int4-g64+a:int4-token",
             "rotate+gptq:int4-g64+a:int4-token"],
    "KV4": ["kv:int4-head", "kv:int4-channel32:int4-head"],
    "KV2": ["kv:int2-head", "kv:int2-channel32:int2-head"],
    "W2": ["rtn:int2-g64", "gptq:int2-g64", "tune:int2-g64,steps=0"],
    "W8": ["rtn:int8-row", "gptq:int8-row"],
    "KV8": ["kv:int8-head"],
    "KV3": ["kv:int3-head", "kv:int3-channel32:int3-head"],
    "W4A8": ["rtn:int4-g64+a:int8-token", "gptq:int4-g64+a:int8-token"],
}  # fmt: skip
"""Each method where it matters most, the most telling groups first: for more models than there is time for all of
:data:`GROUPS`."""
