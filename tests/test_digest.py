"""Identity: sha256 over bytes; a memo never outlives the file it speaks of."""

from __future__ import annotations

import hashlib
import math
import os
import time
from pathlib import Path

import pytest
import torch

from lowbit import digest


def test_known_values(tmp_path: Path) -> None:
    assert digest.of_bytes(b"a", b"bc") == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / "f").write_bytes(b"x" * 5_000_000)
    assert digest.of_file(tmp_path / "f") == hashlib.sha256(b"x" * 5_000_000).hexdigest()
    assert digest.of_value({"b": 1, "a": [None, "ä"]}) == hashlib.sha256('{"a":[null,"ä"],"b":1}'.encode()).hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest.of_value([math.nan])


def test_tensors_by_dtype_shape_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    same = [x, x.clone(), x.t().contiguous().t(), torch.cat([x, x])[:2]]
    assert len({digest.of_tensor(t) for t in same}) == 1
    other = [x, x.view(3, 2), x.double(), x.bfloat16(), x + 1, x[:1], x[0], torch.tensor(1.0), x[:0], x > 1]
    assert len({digest.of_tensor(t) for t in other}) == len(other)


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "f"
    path.write_bytes(b"one")
    reads, plain = [], digest.of_file
    monkeypatch.setattr(digest, "of_file", lambda p: reads.append(p) or plain(p))
    assert digest.of_file_cached(path) == digest.of_file_cached(path) == plain(path)
    assert len(reads) == 2  # changed a moment ago: it may change again without a new date
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)
    digest.of_file_cached(path)
    digest.of_file_cached(path)
    assert len(reads) == 3
    date = path.stat().st_mtime_ns
    time.sleep(0.02)
    path.write_bytes(b"two")
    os.utime(path, ns=(date, date))
    assert digest.of_file_cached(path) == plain(path)


def test_a_broken_or_unwritable_cache_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_SETTLED_NS", 0)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "f"
    path.write_bytes(b"one")
    expected = digest.of_file_cached(path)
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    memo.write_text("")
    assert digest.of_file_cached(path) == expected
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "no-folder"))
    assert digest.of_file_cached(path) == expected
