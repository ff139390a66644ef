"""One plain notation for answers: Unicode, LaTeX and Markdown that mean the same become the same characters.

Nothing that carries meaning is dropped: a dot, a sign, a space between digits, a relation, an arrow stay.
What every grader, `canonical_answer` and the experts' answers go through before anything is compared."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache


def words(text: str) -> frozenset[str]:
    """The words of a list that is written as a text."""
    return frozenset(text.split())


MONEY = "\ue000"
"""Stands for a dollar sign that is money, where plain `$` may be a LaTeX delimiter."""

STRUCK = "\ue001"
"""Stands for what strikes a text out, which nothing understands."""
_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"

_PLAIN = {
    "-": "−–‐‑﹣－", "+": "＋", "=": "＝", "%": "％", ".": "．", ",": "，", "(": "（", ")": "）", "*": "×·∙⋅∗",
    "/": "⁄∕", " ": "\u00a0\u202f\u2009\u2007\u2002\u2003", "'": "’‘′", '"': "“”", "°": "º",
    r"\ldots ": "…", r"\div ": "÷",
    r"\le ": "≤⩽", r"\ge ": "≥⩾", r"\ne ": "≠", r"\approx ": "≈≃∼", r"\pm ": "±", r"\mp ": "∓",
    r"\infty ": "∞", r"\cup ": "∪", r"\cap ": "∩", r"\in ": "∈", r"\leftarrow ": "←", r"\rightarrow ": "→",
    r"\emptyset ": "∅",
}  # fmt: skip
_SIMPLE = str.maketrans(
    {char: new for new, chars in _PLAIN.items() for char in chars}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_SUPERSCRIPTS = {char: str(digit) for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "-", "ⁿ": "n"}
_SUBSCRIPTS = {chr(0x2080 + digit): str(digit) for digit in range(10)}
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z])?")

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|operatorname|emph|bm|boldsymbol|"
    r"boxed|fbox|underline|ensuremath)\*?\s*\{([^{}]*)\}"
)
_BRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_COMMANDS = (
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|Bigl|Bigr)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|rm|bf|it)(?![A-Za-z])"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r",\s*\\!\s*|\{,\}|(?<=\d)\\,(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|(?<!\\)~"), " "),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])|\\not\s*=|!=|=/="), r"\\ne "),
    (re.compile(r"\\(?:leqslant|leq|le)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"=="), "="),
    (re.compile(r"\\(?:approx|approxeq|simeq|sim)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\(?:ldots|dots|cdots|dotsc)(?![A-Za-z])|\.\.\."), r"\\ldots "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\\{\s*\\\}|\\varnothing(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\[lr]vert(?![A-Za-z])"), "|"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\^\s*°"), "°"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\([#&_])"), r"\1"),
    (re.compile(r"\\to(?![A-Za-z])"), r"\\rightarrow "),
    (re.compile(r"\\pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\bsqrt\b(?<!\\sqrt)"), r"\\sqrt"),
    (re.compile(r"(\d)\s*\(?\bbase[\s-]+(\d+)\b\)?"), r"\1_{\2}"),
)
_INLINE = re.compile(r"\$(?=\S)([^$]*?\S)\$(?!\d)|\$(\S)\$(?!\d)")
_BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)([^*]+?)(?<=\S)\*\*(?![\w*])|(?<!\w)__(?=\S)([^_]+?)(?<=\S)__(?!\w)")
_HTML = re.compile(r"<(b|strong|i|em|u)>([^<>]*)</\1>", re.IGNORECASE)
_PERIOD = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|overbar)\s*(?:\{(\d{1,9})\}|(\d))(?!\d)")
"""A repeating decimal."""
_TICKS = re.compile(r"\s*[✓✔✅☑]\ufe0f?\s*$")
_ENDS = " \t\n*`\"'"


@lru_cache(maxsize=8192)
def plain(text: str) -> str:
    """The text in plain notation, spaces single; the cost is linear in its length (callers bound it)."""
    text = _TICKS.sub("", text.strip(_INVISIBLE)).replace("~~", STRUCK)
    text = _markdown(text)
    text = _fractions(text).translate(_SIMPLE)
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt ", text)
    text = _greek(text)
    text = _delimiters(text)
    for pattern, new in _COMMANDS:
        text = pattern.sub(new, text)
    text = _PERIOD.sub(_ratio, _unwrapped(text))
    text = re.sub(r"\s+(?=[\^_])", "", text)
    return _trimmed(" ".join(text.split()))


def _markdown(text: str) -> str:
    text = text.strip(" \t\n`")
    text = _HTML.sub(r"\2", _BOLD.sub(lambda m: m[1] or m[2], text))
    if text.startswith("*") and text.endswith("*") and "*" not in text[1:-1]:
        text = text[1:-1]
    return text


def _fractions(text: str) -> str:
    """Vulgar fractions: 1½ is 1 1/2."""
    for char in {char for char in text if "\u00bc" <= char <= "\u00be" or "\u2150" <= char <= "\u215e"}:
        text = text.replace(char, " " + unicodedata.normalize("NFKC", char).replace("\u2044", "/"))
    return text


def _ratio(match: re.Match[str]) -> str:
    whole, once, again = match[1] or "0", match[2], match[3] or match[4]
    if len(whole + once) > 12:
        return match[0]
    nines = 10 ** len(again) - 1
    value = int(whole + once) * nines + int(again)
    return f" {value}/{nines * 10 ** len(once)} "


def _greek(text: str) -> str:
    for char in {char for char in text if "\u0391" <= char <= "\u03c9"}:
        name = unicodedata.name(char, "").split()
        if len(name) == 4 and name[:1] == ["GREEK"]:
            letter = name[3].lower() if name[1] == "SMALL" else name[3].capitalize()
            text = text.replace(char, f"\\{letter} ")
    return text


def _delimiters(text: str) -> str:
    """Without marks of mathematics; a dollar sign that opens none (as Markdown decides it) is money."""
    text = text.replace("\\$", MONEY)
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text).replace("$$", " ")
    text = _INLINE.sub(lambda m: f" {m[1] or m[2]} ", text)
    return text.replace("$", MONEY)


def _unwrapped(text: str) -> str:
    """Contents of \\text{...} and the like, innermost first."""
    for _ in range(4):
        text, count = _WRAPPER.subn(r" \1 ", text)
        if not count:
            break
    while (match := _BRACED_BOX.search(text)) is not None:
        end = _closing(text, match.end())
        if end is None:
            break
        text = f"{text[: match.start()]} {text[match.end() : end]} {text[end + 1 :]}"
    return text


def _closing(text: str, start: int) -> int | None:
    """Place of the brace that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return place
    return None


def _trimmed(text: str) -> str:
    """Without quotes and stops around it; a leading dot belongs to a decimal, an ellipsis to a list."""
    before = None
    while before != text:
        before = text
        text = text.strip(_ENDS)
        if text.endswith((".", ",")) and not text.endswith(("..", "\\,")):
            text = text[:-1]
        text = text.removeprefix(": ")
    return text


# --- labels ---------------------------------------------------------------------------------------

BLOCKERS = words(
    """
    not no never nor neither none nothing cannot can't won't don't doesn't isn't aren't wasn't weren't
    wouldn't couldn't shouldn't except excluding without but wrong incorrect false untrue mistake error
    maybe perhaps possibly probably if unless or than over under above below twice thrice double triple
    half third quarter squared cubed square cube root factorial minus plus log nearly almost hardly step
    unknown anything everything something lie guess opposite reciprocal inverse negative
    doubtful unlikely unsure uncertain impossible invalid rejected refuse refused excluded discarded
    """
)
"""Words that no label, subject or unit may hold: they deny, hedge, compare or rescale."""

_LABEL_WORDS = words(
    """
    so thus hence therefore then and we get have the a an my our his her their its your final correct
    right best exact answer answers option choice solution result value total sum number amount cost price
    is are was equals equal to be of it that this there she he they you i finally which means gives obtain
    conclude area perimeter volume length width height radius distance speed time average mean probability
    """
)
_ENDS_IN = ("is", "are", "was", "equals", "to", "be", "get", "have", "thus", "hence", "so", "therefore")
_ANY_WORD = "|".join(sorted(_LABEL_WORDS, key=len, reverse=True))
_SENTENCE = re.compile(rf"(?:(?:{_ANY_WORD})\b[\s,]+)*?(?:{'|'.join(_ENDS_IN)})\b[\s,:]+|=\s*", re.IGNORECASE)
_COLON = re.compile(r"([A-Za-z][A-Za-z']*(?: [A-Za-z][A-Za-z']*){0,4})\s*\*{0,2}\s*:\s*(?=\S)")
NAME = re.compile(
    r"[A-Za-z](?:_(?:\{\w+\}|\w))?'?(?:\([A-Za-z]\))?|\\[a-zA-Z]+(?:_(?:\{\w+\}|\w))?|"
    r"\([A-Za-z](?:, ?[A-Za-z])+\)|[A-Za-z]{2,20}(?: [A-Za-z]{2,20}){0,3}"
)


def without_label(text: str) -> str:
    """Plain text without `Answer:` or `the answer is` in front; a label that denies anything stays."""
    before = None
    while before != text:
        before = text
        match = _COLON.match(text)
        if match and not BLOCKERS & set(match[1].lower().split()):
            text = text[match.end() :].strip(_ENDS)
        match = _SENTENCE.match(text)
        if match and match.end() < len(text):
            text = text[match.end() :].lstrip(" :")
    return text


def is_name(text: str) -> bool:
    """Whether `text` may stand before an equals sign as what is asked for: a variable, f(x) or plain words."""
    text = text.strip()
    if text.startswith("\\") and text[1:].split("_")[0] not in GREEK:
        return False
    return NAME.fullmatch(text) is not None and not BLOCKERS & set(text.lower().split())


GREEK = words(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma
    tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell
    """
)
