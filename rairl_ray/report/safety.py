"""Hostile text made harmless: what may stand in a file, on the page, in a drawing."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufffe\uffff]"
)


def clean(text: str) -> str:
    """Text that UTF-8 can hold: half a surrogate pair, which JSON allows, becomes U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def visible(text: str) -> str:
    """Model text as it may be shown: control characters as symbols, marks that turn the direction by number."""
    return _HIDDEN.sub(lambda match: _shown(ord(match[0])), str(text))


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return "\u2421" if code == 0x7F else f"⟨U+{code:04X}⟩"
