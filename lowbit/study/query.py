"""SQL over a study: its cells, findings and every scored token as views of DuckDB. Reads only.

    cells      key, role, model, stage, label, status, seconds, cpu_seconds, peak_bytes, error
    findings   key, and the fields of ``Finding``: metric, value, low, high, unit, n, p, p_adjusted, verdict ...
    tokens     key, and the columns of ``Tokens``: doc, chunk, pos, token, nll, nll_ref, kl, top1, top1_ref ...

A view without rows is not there; findings are stored when a table is printed. ``key`` is the cell's:

    SELECT label, avg(kl) FROM tokens JOIN cells USING (key) GROUP BY label
"""

from __future__ import annotations

import duckdb
import pyarrow as pa

from lowbit.errors import StudyError
from lowbit.evaluation.evidence import TOKENS
from lowbit.study.store import Store

_CELL = ("key", "stage", "label", "status", "seconds", "cpu_seconds", "peak_bytes", "error")
_CLOSED: dict[str, str | bool | int | float | list[str]] = {  # no downloads, no Python variables as tables
    "autoinstall_known_extensions": False, "autoload_known_extensions": False, "python_enable_replacements": False,
}  # fmt: skip


def query(store: Store, study: str, sql: str) -> pa.Table:
    """The answer to ``sql`` over one study of a store. Raises StudyError for SQL that means nothing.

    SQLite is read through Python, Parquet by DuckDB itself: nothing is downloaded.
    """
    members = store.cells(study)
    keys = [cell.key for _, cell in members]
    cells = [
        {"role": role, "model": role.rpartition("/")[0], **{name: getattr(cell, name) for name in _CELL}}
        for role, cell in members
    ]  # fmt: skip
    findings = [{"key": row.key, **row.value} for row in store.findings(keys)]
    files = {key: store.evidence_folder(key) / TOKENS for key in dict.fromkeys(keys)}
    held = [str(path) for path in files.values() if path.exists()]
    try:
        with duckdb.connect(config=_CLOSED) as db:
            db.register("cells", pa.Table.from_pylist(cells))
            if findings:
                db.register("findings", pa.Table.from_pylist(findings))
            if held:
                found = db.read_parquet(held, filename=True)
                found.project("split_part(filename, '/', -2) AS key, * EXCLUDE (filename)").create_view("tokens")
            return db.sql(sql).to_arrow_table()
    except duckdb.Error as error:
        raise StudyError(
            str(error), where=f"SQL over study {study!r}", fix="the views cells, findings and tokens; DESCRIBE cells"
        ) from error
