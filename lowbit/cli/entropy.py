"""lowbit inspect --entropy: what lossless coding gives or would give, by tensor and field."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.options import emit, say

if TYPE_CHECKING:
    from lowbit.io.entropies import TensorEntropy

_LEFT = ("tensor", "dtype", "field", "codec")
_LEGEND = (
    "entropy, stored: bits a code, at order 0 and as {how}. codec: constant, raw (packed, not coded), tans, or ranked "
    "(tans over ranks)."
)


def show(model: str, as_json: bool) -> None:
    """Print entropies of a file, a directory or a name of a model."""
    from lowbit.cli.progress import Bars
    from lowbit.io.compress import coded_files
    from lowbit.io.entropies import entropies

    path = Path(model).expanduser()
    if not path.exists():
        from lowbit.models.resolve import locate

        path = locate(model, say)
    coded, rows = bool(coded_files(path)), []
    with Bars() as bars:
        for done, tensor in enumerate(entropies(path), 1):
            rows.append(tensor)
            bars.update("entropies", done, done, "tensors")
    totals = _totals(rows, coded)
    if as_json:
        emit({"summary": totals, "tensors": [_json(row) for row in rows]})
        return
    _print(totals, rows, coded)


def _totals(rows: list[TensorEntropy], coded: bool) -> dict[str, Any]:
    """Sums over all tensors; by dtype too, since a file mixes 16-bit tensors with codes and scales."""
    before, after = sum(row.nbytes for row in rows), sum(row.stored for row in rows)
    by_dtype: dict[str, dict[str, float]] = {}
    for row in rows:
        held = by_dtype.setdefault(row.dtype, {"tensors": 0, "bytes": 0, "stored": 0})
        held["tensors"] += 1
        held["bytes"] += row.nbytes
        held["stored"] += row.stored
    return {
        "compressed": coded, "tensors": len(rows), "bytes": before, "stored": round(after),
        "ratio": before / after if after else 1.0, "by_dtype": by_dtype,
    }  # fmt: skip


def _json(row: TensorEntropy) -> dict[str, Any]:
    fields = [
        {
            "field": f.name, "codec": f.codec, "codes": f.codes, "raw_bits": f.raw_bits, "entropy": f.entropy,
            "stored_bits": f.stored_bits,
        }
        for f in row.fields
    ]  # fmt: skip
    return {
        "file": row.file, "tensor": row.name, "dtype": row.dtype, "shape": list(row.shape), "bytes": row.nbytes,
        "stored": round(row.stored), "ratio": row.nbytes / row.stored if row.stored else 1.0, "layout": row.layout,
        "fields": fields,
    }  # fmt: skip


def _print(totals: dict[str, Any], rows: list[TensorEntropy], coded: bool) -> None:
    from lowbit.cli.columns import print_columns
    from lowbit.report.text import size

    what = "stored" if coded else "would be"
    before, after = size(totals["bytes"]), size(totals["stored"])
    print(f"{totals['tensors']} tensors, {before}; {what} {after} ({totals['ratio']:.3f}x)")
    for dtype, held in totals["by_dtype"].items():
        ratio = held["bytes"] / held["stored"] if held["stored"] else 1.0
        before, after = size(held["bytes"]), size(round(held["stored"]))
        print(f"  {dtype}: {held['tensors']} tensors, {before}; {what} {after} ({ratio:.3f}x)")
    print()
    lines = []
    for row in rows:
        ratio = f"{row.nbytes / row.stored:.3f}" if row.stored else "1.000"
        head = [row.name, row.dtype, size(row.nbytes), ratio]
        if not row.fields:
            lines.append([*head, "all", "as it is", "", "", ""])
        for field in row.fields:
            lines.append(
                [
                    *head,
                    field.name,
                    field.codec,
                    str(field.raw_bits),
                    f"{field.entropy:.3f}",
                    f"{field.stored_bits:.3f}",
                ]
            )
            head = ["", "", "", ""]
    print_columns(["tensor", "dtype", "bytes", "ratio", "field", "codec", "bits", "entropy", "stored"], lines, _LEFT)
    print("\n" + _LEGEND.format(how="stored" if coded else "it would be stored"))
