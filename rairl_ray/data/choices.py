"""Multiple choice: options and gold letter of a row, and which option an answer names, never more than one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from rairl_ray.data.math_equality import equal_mathematics
from rairl_ray.data.notation import BLOCKERS, plain, words
from rairl_ray.data.quantities import parse_quantity, same_quantity
from rairl_ray.data.rows import BadRow
from rairl_ray.types import Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LENGTH = 2000

Options = Mapping[str, str]

_LEAD_WORDS = words(
    """
    so thus hence therefore then the my our correct right best final most likely answer option choice letter
    diagnosis is are it's it that this must should would be i we think believe choose chose pick selected
    select with go to
    """
)
_LEAD = re.compile(
    rf"(?:(?:(?-i:an?)|{'|'.join(sorted(_LEAD_WORDS, key=len, reverse=True))})\b[\s:,*]*)+", re.IGNORECASE
)
"""All that may stand in front of the option that an answer names."""
_IS_RIGHT = re.compile(
    r"(?:is|would be|must be|as) (?:the |my )?"
    r"(?:(?:most )?(?:likely|correct|right|best|final|appropriate)\b ?)*"
    r"(?:answer|option|choice|one|diagnosis)?",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?:,\s*)?\(?(?:because|since|as|due to|for)\b", re.IGNORECASE)
_APART = re.compile(r"\s*(?:[.):\]]|\s[-–—]\s|,|\n|[-–—](?=\s))")
"""What separates an option's letter from its text or an explanation."""
_LABELLED = re.compile(r"\s*[(\[]?([A-Z])\s*[.):\]]\s*(\S.*)", re.DOTALL)
_LETTERED_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


# --- options and gold -----------------------------------------------------------------------------


def read_options(value: object) -> dict[str, str] | None:
    """Options as letter -> text; else None.

    From a mapping, a list (texts; texts with their letters, `A) 125`; objects with a label and a text), columns
    of labels and texts, any of them as JSON, or lines `A. text`. A null option keeps its letter unused.
    """
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            return {m[1]: m[2] for m in _LETTERED_LINE.finditer(text)} or None
    if isinstance(value, Mapping):
        labels, texts = (
            _first(value, names) for names in (("label", "labels", "key"), ("text", "texts", "value"))
        )
        if isinstance(labels, Sequence) and isinstance(texts, Sequence) and not isinstance(labels, str):
            value = dict(zip(labels, texts, strict=False))
        return _present({str(key).strip().upper(): text for key, text in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _listed(list(value))
    return None


def options_in(values: Mapping[str, object]) -> dict[str, str] | None:
    """The options of a row: in one column (`options`, `choices`, `endings`), or in one column each."""
    for name in ("options", "choices", "endings"):
        if values.get(name) is not None:
            return read_options(values[name])
    for pattern in ("{}", "op{}", "option_{}", "Option {}", "choice_{}", "option{}"):
        names = [(letter, name) for letter in LETTERS[:10] for name in _spelled(pattern, letter)]
        found = {letter: values[name] for letter, name in names if name in values}
        if len(found) > 1:
            return _present(found)
    return None


def _spelled(pattern: str, letter: str) -> set[str]:
    return {pattern.format(letter), pattern.format(letter.lower())}


def _first(value: Mapping[object, object], names: Sequence[str]) -> object:
    return next((value[name] for name in names if name in value), None)


def _listed(items: list[object]) -> dict[str, str]:
    if items and all(isinstance(item, Mapping) for item in items):
        pairs = [
            (
                _first(item, ("label", "key", "id", "letter")),
                _first(item, ("text", "value", "content", "option")),
            )
            for item in items
            if isinstance(item, Mapping)
        ]
        if all(label is not None for label, _ in pairs):
            return _present({str(label).strip().upper(): text for label, text in pairs})
        items = [text for _, text in pairs]
    lettered = [_LABELLED.fullmatch(item) if isinstance(item, str) else None for item in items]
    if items and all(match and match[1] == letter for match, letter in zip(lettered, LETTERS, strict=False)):
        items = [match[2] for match in lettered if match]
    return _present(dict(zip(LETTERS, items, strict=False)))


def _present(options: Mapping[str, object]) -> dict[str, str]:
    """Options that are there, as text."""
    missing = {
        letter for letter, text in options.items() if text is None or (isinstance(text, float) and text != text)
    }
    return {letter: _text(text) for letter, text in options.items() if letter not in missing}


def _text(value: object) -> str:
    return (
        str(int(value))
        if isinstance(value, float) and math.isfinite(value) and value.is_integer()
        else str(value)
    )


def choice_prompt(
    prompt_id: str,
    question: str,
    options: Options,
    answer: object,
    metadata: Mapping[str, object] | None = None,
) -> Prompt:
    """A problem with its options below the question, and its gold letter (None: it has none).

    Raises BadRow for an answer that is not exactly one of the options (see `gold_letter`).
    """
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return Prompt(
        id=prompt_id,
        question=f"{question}\n{lines}",
        answer=None if answer is None else gold_letter(answer, options),
        metadata={"options": dict(options), **(metadata or {})},
    )


def gold_letter(gold: object, options: Options) -> str:
    """The right option: by letter, by text, or (a whole number) by its place from 0.

    Raises BadRow where that is no option, or where a number is one option's place and another one's text.
    """
    if isinstance(gold, float) and math.isfinite(gold) and gold.is_integer():
        gold = int(gold)
    place = gold if isinstance(gold, int) and not isinstance(gold, bool) else None
    by_text = letter_of(str(gold), options)
    letters = list(LETTERS if set(options) <= set(LETTERS) else options)
    by_place = letters[place] if place is not None and 0 <= place < len(letters) else None
    by_place = by_place if by_place in options else None
    if by_text and by_place and by_text != by_place:
        raise BadRow(f"the answer {gold} is the place of option {by_place} and names option {by_text}")
    letter = by_text or by_place
    if letter is None:
        raise BadRow(f"the answer {str(gold)[:40]!r} is none of the options ({', '.join(options)})")
    return letter


def letter_of(gold: str, options: Options) -> str | None:
    """The option that a gold answer names by letter or by text."""
    letter = gold.strip().strip("().").strip().upper()
    return letter if letter in options else chosen_letter(gold, options)


# --- which option an answer names -----------------------------------------------------------------


def chosen_letter(text: str, options: Options) -> str | None:
    """The one option that ALL of `text` names, by letter or by its text; None if it names none or several.

    An answer is [words that lead to it] OPTION [its text, or an explanation that names no other]. What denies
    an option, or is not understood, names none.
    """
    if len(text) > MAX_LENGTH or not options:
        return None
    answer = _normal(text.replace("\n", " \n "))
    known = {letter: _normal(option) for letter, option in options.items()}
    whole = [letter for letter, option in known.items() if option.casefold() == answer.casefold()]
    if whole:
        return whole[0] if len(whole) == 1 else None
    by_value = _by_value(answer, known)
    if by_value is not None:
        return by_value
    lead = _LEAD.match(answer)
    starts = {0, lead.end() if lead else 0}
    found = {
        letter for start in starts for letter in _named(answer[start:].lstrip(), known, lead and start > 0)
    }
    return found.pop() if len(found) == 1 else None


def _by_value(answer: str, known: Mapping[str, str]) -> str | None:
    """The option of the same number or expression; as it is written, before as a percentage of it."""
    quantity = parse_quantity(answer)
    if quantity is not None:
        values = {letter: parse_quantity(option) for letter, option in known.items()}
        same = [
            letter for letter, value in values.items() if value is not None and same_quantity(value, quantity)
        ]
        if same:
            return same[0] if len(same) == 1 else None
    elif not re.search(r"[\d\\=^]", answer):
        return None
    same = [letter for letter, option in known.items() if equal_mathematics(option, answer)]
    return same[0] if len(same) == 1 else None


def _named(answer: str, known: Mapping[str, str], led: object) -> set[str]:
    """Options that `answer` begins with, where nothing behind them says otherwise."""
    found = set()
    for letter, option in known.items():
        head = re.match(rf"[(\[]?({re.escape(letter)})(?![\w'+])[)\]]?", answer, re.IGNORECASE)
        # A lone small letter, or one in brackets or behind "option", is a letter; elsewhere "a" is an article.
        text_follows = head is not None and _bare(answer[head.end() :]) == _bare(option)
        if head and (head[1] == letter or head[0] == answer or head[0][0] in "([" or led or text_follows):
            end = head.end()
        elif _begins(answer, option, known):
            end = len(option)
        else:
            continue
        if _goes_on(answer[end:], letter, known, named_by_letter=head is not None and end == head.end()):
            found.add(letter)
    return found


def _begins(answer: str, option: str, known: Mapping[str, str]) -> bool:
    """Whether `answer` begins with this option's text, and with no longer one that begins alike."""
    longer = (other for other in known.values() if len(other) > len(option))
    return (
        len(option) > 1
        and re.match(rf"{re.escape(option)}(?!\w|[.+-]?\d)", answer, re.IGNORECASE) is not None
        and not any(answer.lower().startswith(other.lower()) for other in longer)
    )


def _goes_on(rest: str, letter: str, known: Mapping[str, str], named_by_letter: bool) -> bool:
    """Whether what follows an option is nothing, its text or letter, or an explanation that names no other."""
    rest, own = rest.rstrip(" .!"), known[letter]
    if _bare(rest) == _bare(own):
        return True
    right = _IS_RIGHT.match(rest.lstrip())
    if right:
        rest = rest.lstrip()[right.end() :]
    if _bare(rest) in ("", _bare(own), letter.lower()):
        return True
    reason = _REASON.match(rest.lstrip())
    apart = _APART.match(rest)
    if apart is None and reason is None and not rest.lstrip().lower().startswith(own.lower()):
        return False
    said = rest[apart.end() if apart else 0 :].strip(" .()")
    if not named_by_letter and not reason:
        return False
    if not reason and BLOCKERS & set(re.findall(r"[a-z']+", _without(said, own).lower())):
        return False
    return not _names_another(said, letter, known)


def _bare(text: str) -> str:
    return text.strip(" .,:()[]-–—\"'").lower()


def _without(text: str, option: str) -> str:
    return re.sub(re.escape(option), " ", text, flags=re.IGNORECASE) if len(option) > 1 else text


def _names_another(text: str, letter: str, known: Mapping[str, str]) -> bool:
    """Whether another option's letter or text stands in `text`, outside of this option's own text."""
    text = _without(text, known[letter])
    for other, option in known.items():
        if other == letter:
            continue
        letters = (
            rf"\({other}\)|(?<![\w'-]){other}(?![\w'-])"
            if other not in "AI"
            else rf"\({other}\)|(?<!\w){other}(?=[.):,]|$)"
        )
        if re.search(letters, text):
            return True
        words = option.lower() not in known[letter].lower() or option.lower() in text.lower()
        if (
            len(option) > 1
            and words
            and re.search(rf"(?<![\w.+-]){re.escape(option)}(?!\w|\.\d)", text, re.IGNORECASE)
        ):
            return True
    return False


def _normal(text: str) -> str:
    return plain(text).strip(" ,;:\"'`*")
