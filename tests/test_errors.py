"""The error tree: messages say what, where, why and what to try, and survive a trip between processes."""

from __future__ import annotations

import pickle

from lowbit import errors
from lowbit.errors import GramError, LowbitError, MissingExtra, nearest


def test_messages() -> None:
    error = GramError("is singular", where="layer 3", why="it was never seen", fix="more text")
    assert str(error) == "layer 3: is singular\nit was never seen\nTry: more text"
    assert str(LowbitError("broke")) == "broke"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.fix) == (GramError, str(error), "more text")
    assert "pip install 'lowbit[ray]'" in str(MissingExtra.of("ray", "ray"))


def test_every_error_is_in_the_tree_and_documented() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, LowbitError) for c in classes)
    for c in classes:
        assert c.__name__ in (errors.__doc__ or "")


def test_the_nearest_name() -> None:
    assert nearest("gtpq", ["rtn", "gptq"]) == "did you mean 'gptq'?"
    assert nearest("zzz", ["rtn", "gptq"]) == "one of: gptq, rtn"
