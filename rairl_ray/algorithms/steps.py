"""Where a reasoning step ends in a text: after a line, a closing tag, or a sentence as a reader sees it.

One pass: every pattern below that runs over the text accepts as soon as its first character fits, so nothing is
ever read twice, and all other looks are at most WINDOW characters wide. A collapsed policy's megabyte of one
character takes no longer than a megabyte of prose.
"""

from __future__ import annotations

import re

WINDOW = 32
"""Characters before and after a full stop that decide what it is."""

_CLOSING = r"""["'”’»)\]*」』）】》〉]*"""
_BREAK = re.compile(
    rf"(?P<line>\n\s*)|</(?:think|answer)>|(?P<wide>[。｡！？；।؟۔]+){_CLOSING}|(?P<stop>[.!?;]+){_CLOSING}"
)
_NOTHING_YET = re.compile(r"(?:\s|<think>|<answer>)*+")
_TAG = re.compile(r"<[/A-Za-z]")

_ENUMERATOR = re.compile(
    r"""(?:\s|<think>|<answer>|[-*•\#>])*  (?:(?:step|case|part|question|problem|rule)[ ])?
        \(?(?:(?:\d{1,3}\.)*\d{1,3} | [a-z] | [ivx]{1,5})\)?""",
    re.I | re.X,
)
_FACTORIAL = re.compile(r"(?:\d|(?<![^\W\d_])[^\W\d_]|(?:\d|[^\w)][^\W\d_])\))$")
_NOT_AFTER_A_FACTORIAL = re.compile(r"""["'“‘(]*(?:[A-Z]|[a-z]\W)""")
_ELLIPSIS_IN_A_SEQUENCE = re.compile(r"[,+\-*/×·=<>(\[{]\s*$")
_ENTITY = re.compile(r"&#?\w{1,8}$")
_DELIMITER = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)$")
_DOTTED = re.compile(r"(?:^|[^A-Za-z])(?:[A-Za-z]\.)+[A-Za-z]$")
_TIME_OF_DAY = re.compile(r"\b[ap]\.m$", re.I)
_LAST_WORD = re.compile(r"([A-Za-z]+)$")
_MEASURED = re.compile(r"\d\s*[A-Za-z]+$")
_WORD_BEFORE_A_LETTER = re.compile(r"([A-Za-z]+)\s+[A-Z]$")
_NAME = re.compile(r"([A-Z])(?:\.|[a-z'’-]+)")
_CAPITALISED = re.compile(r"""["'“‘(*$\\]*[A-Z]""")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_LAST = _words("mr mrs ms messrs dr prof st rev hon gen col capt lt sgt vs cf viz approx resp eg ie")
_SOMETIMES_LAST = _words("etc inc ltd co corp jr sr al dept est ca phd")
"""End a sentence where a capital letter follows, and abbreviate where none does."""
_UNITS = _words("in ft lb lbs oz hr hrs min mins sec secs yd yds mi gal pt qt m cm mm km kg mg g ml l")
"""The same, but only after a number: `5 in. wide` against `he came in. then`."""
_BEFORE_A_NUMBER = _words(
    "no nos fig figs eq eqs eqn sec ch chap vol pp p art def thm lem prop cor ex tab "
    "jan feb mar apr jun jul aug sep sept oct nov dec"
)
_LABELS = _words(
    "option options choice choices answer answers point points case step part figure set vector matrix angle "
    "triangle line plan event box bag player team person train car type grade group class stage vitamin "
    "hepatitis column row statement variable city town item node"
)
"""What a lone capital letter names; elsewhere between two names it is an initial."""
_OPENERS = _words(
    "the then therefore thus so hence since if but and now next we it this that these those he she they i you "
    "there here let what which why how for in on at as when while because by to from with after before finally "
    "first second third also however moreover a an its his her their our my is are not no yes each every all "
    "both using given step option answer adding subtracting multiplying dividing"
)
"""Words that open a sentence and are no family names."""


def step_ends(text: str) -> list[int]:
    """Character offsets (exclusive) at which a reasoning step is complete, increasing.

    White space alone and opening tags alone are no step: "a.\\n\\nb" has one end before b, and the line
    "<think>" has none.
    """
    ends: list[int] = []
    start = seen = 0
    filled = False
    for match in _BREAK.finditer(text):
        if not filled and seen < match.start():
            filled = _NOTHING_YET.fullmatch(text[seen : match.start()]) is None
        seen = match.end()
        end = match.end()
        if match["line"]:
            end = match.start() + 1
            if not filled:
                continue
        elif match["stop"]:
            if not filled or not _ends_sentence(text, start, match):
                filled = True
                continue
        elif match["wide"] and not filled:
            filled = True
            continue
        ends.append(end)
        start, filled = end, False
    return ends


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the stops at `match` end the sentence that began at `start`."""
    stop, at, end = match["stop"], match.start(), match.end()
    following = text[end : end + 2]
    # Only before white space, a tag or the end: decimal points, versions and web addresses stay whole.
    if following and not following[0].isspace() and not _TAG.match(following):
        return False
    before, after = text[max(start, at - WINDOW) : at], text[end : end + WINDOW].lstrip(" \t")
    if before.endswith("\\"):  # LaTeX's own spaces: \; and \!
        return False
    last = not after or after[0] == "\n" or _TAG.match(after) is not None
    if stop in ("!", "!!") and _FACTORIAL.search(before[-4:]):
        return last or _NOT_AFTER_A_FACTORIAL.match(after) is not None
    if stop == ";":
        return _ENTITY.search(before) is None
    if len(stop) > 1 and set(stop) == {"."}:
        return last or _ELLIPSIS_IN_A_SEQUENCE.search(before) is None
    return stop != "." or _full_stop(before, after, at - start <= WINDOW)


def _full_stop(before: str, after: str, whole: bool) -> bool:
    """False for the dot of an enumerator, an abbreviation, an initial or a LaTeX delimiter.

    whole: `before` reaches back to the beginning of the step.
    """
    token = before.split()[-1] if before and not before[-1].isspace() else ""
    if (whole and _ENUMERATOR.fullmatch(before)) or _DELIMITER.search(token):
        return False
    capital = _CAPITALISED.match(after) is not None
    if _DOTTED.search(token):
        return capital and _TIME_OF_DAY.search(token) is not None
    if token.endswith("Ph.D"):
        return capital
    word = _LAST_WORD.search(token)
    if word is None:
        return True
    last = word[1].lower()
    if last in _NEVER_LAST:
        return False
    if last in _BEFORE_A_NUMBER and after[:1].isdigit():
        return False
    if last in _SOMETIMES_LAST or (last in _UNITS and _MEASURED.search(before)):
        return capital
    return not (len(last) == 1 and _is_initial(before, after))


def _is_initial(before: str, after: str) -> bool:
    """Whether the lone letter at the end is an initial (`John F. Kennedy`) or a list's (`5 B. 6`)."""
    if not before[-1].isupper():
        return False
    if after[:1].isdigit():
        return before[:-1].rstrip()[-1:].isdigit()
    name = _NAME.match(after)
    if name is None or name[0].lower() in _OPENERS:
        return False
    if before[:-1].rstrip()[-1:] == ".":  # behind another initial or a title
        return True
    word = _WORD_BEFORE_A_LETTER.search(before)
    return word is not None and word[1][0].isupper() and word[1].lower() not in _LABELS
