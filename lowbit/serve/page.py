"""The chat page: one HTML document with its style and scripts inside, that loads nothing and runs nothing else.

``page()`` is the body for ``/`` and ``headers()`` goes with it. The content security policy names the digests of the
page's own style and scripts, and lets it talk to its own server only. What models write is shown as text.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from string import Template

_SCRIPTS = ("stream.js", "page.js")


@cache
def page() -> str:
    """The whole document, about 30 kB; the same for every model, which it asks the server for."""
    style, script = _style(), _script()
    return Template(_resource("page.html")).substitute(policy=_policy(), style=style, script=script)


def headers() -> dict[str, str]:
    """What the server must send with the page: the policy, also against framing, and no guessing or telling."""
    return {
        "Content-Security-Policy": f"{_policy()}; frame-ancestors 'none'",  # means nothing inside a document
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _policy() -> str:
    return (
        f"default-src 'none'; script-src {_hash(_script())}; style-src {_hash(_style())}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    return _resource("page.css")


def _script() -> str:
    return "\n".join(map(_resource, _SCRIPTS))


def _hash(content: str) -> str:
    """The content of an element as a source of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _resource(name: str) -> str:
    return files("lowbit.serve").joinpath(name).read_text(encoding="utf-8")
