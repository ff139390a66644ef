"""The words that may stand around a number in an answer: what is not listed, or built as listed, is not
understood."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rairl_ray.data.notation import BLOCKERS, words
from rairl_ray.data.units import RAISED, known

LEAD = words(
    """
    so thus hence therefore then and the a an my our his her their its your final correct right answer
    answers result solution value values total totals sum number amount cost costs price is are was were be
    equals equal to of for in on at by with it that this there here she he they we you i has have had need needs
    needed get gets got make makes made pay pays paid earn earns earned spend spends spent save saves saved
    run runs ran walk walks walked drive drives drove eat eats ate buy buys bought sell sells sold take takes
    took give gives gave use uses used cost weigh weighs contain contains hold holds read reads write writes
    work works worked travel travels traveled collect collects collected receive receives received leave
    leaves left remaining remain remains will can must exactly only just precisely about around approximately
    approx roughly each every per day week month year after all altogether together people children students
    minutes hours days weeks months years dollars cents money age person student child group box bag class
    worker family team old area perimeter volume length width height distance speed time average mean median
    probability remainder difference product profit change which means gives as be """
)
"""Before the number. Proper names are let in by `allowed_before`."""

UNITS = words(
    """
        mm cm dm m km in ft yd mi nm um mg g kg t lb lbs oz ml mL cl dl l L gal qt pt s sec secs min mins h hr
    hrs d wk wks mo mos yr yrs y ms ns Hz kHz MHz GHz N kN J kJ MJ cal kcal W kW MW Wh kWh V mV kV A mA K
    C F Pa kPa MPa bar atm psi mol B KB kB MB GB TB bit byte cc mph mpg kph kmh fps rpm deg rad sr sq cu pts pp
    am pm a.m p.m a.m. p.m. usd eur gbp inr jpy cny chf cad aud rs ohm ohms Ω µm μm ° °C °F ℃ ℉ ¢ c meter
    metre centimeter centimetre kilometer kilometre millimeter inch foot yard mile gram kilogram pound
    ounce ton tonne liter litre milliliter gallon second minute hour day week month year degree radian
    dollar cent euro person percent square cubic piece unit o'clock each
    """
)
_MORE = words(
    """
        more fewer less left remaining total altogether old long high tall wide deep away ago later apart in
    all together extra additional only per of the a an each every for at on with from to by his her their
    its my our this that one and now today again people men women children feet mice teeth geese fish
    sheep deer pence money percentage
    """
)
_OPENERS = words(
    """
        of the a an per each every in for at on with from to by his her their its my our this that
    """
)
_CONNECTIVES = words("so thus hence therefore then and finally")
_IS = words("is are was were equals be")
_NO_NOUNS = words(
    """
        less yes is was has does its this thus plus minus as us others sometimes always perhaps versus besides
    is unless fails misses lies dozens hundreds thousands millions billions halves thirds quarters fifths
    """
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_IS_IT = re.compile(
    r"\bis (?:the|our|my) (?:(?:final|correct|right|exact) )?(?:answer|result|total|solution|value|sum)$"
)
_WORD = re.compile(
    r"(?P<word>[A-Za-z°Ωµμ℃℉¢][A-Za-z°Ωµμ'.-]*?)\.?(?P<power>\^\{?-?\d\}?|(?<=[a-z])[23](?!\w))?(?=[\s,/*()!]|$)"
)


def word_number(word: str) -> int | None:
    """0..99 from its English word."""
    first, _, second = word.partition("-")
    if not second:
        if first in _ONES:
            return _ONES.index(first)
        return 20 + 10 * _TENS.index(first) if first in _TENS else None
    if first in _TENS and second in _ONES[1:10]:
        return 20 + 10 * _TENS.index(first) + _ONES.index(second)
    return None


_THOUSANDS = {"thousand": 10**3, "million": 10**6, "billion": 10**9}


def in_digits(text: str) -> str:
    """The text with the number that it begins with in digits, if only units or things stand behind it:
    `twenty-one apples`, `two hundred and five`."""
    said = text.strip().lower().split()
    total, group, scale, used = 0, 0, 10**12, 0
    for place, word in enumerate(said):
        value = 1 if word in ("a", "one") else word_number(word)
        if word == "and" and place and said[place - 1] in ("hundred", *_THOUSANDS):
            continue
        article = word == "a" and not {"hundred", *_THOUSANDS} & set(said[place + 1 : place + 2])
        if value is not None and not article:
            before = said[place - 1] if place else ""
            if before == "zero" or (group % 100 and not (before in _TENS and 0 < value < 10)):
                return text
            group += value
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _THOUSANDS and group and _THOUSANDS[word] < scale:
            scale = _THOUSANDS[word]
            total, group = total + group * scale, 0
        else:
            break
        used = place + 1
    rest = text.strip().split()[used:]
    understood = used and all(is_unit(word) or is_plural(word.lower()) for word in rest)
    return " ".join([str(total + group), *rest]) if understood else text


def allowed_before(text: str) -> bool:
    """Whether all words in front of a number only lead to it: listed ones, a label, or a name as subject."""
    label, colon, rest = text.rpartition(":")
    if colon and (BLOCKERS & set(label.lower().split()) or not re.fullmatch(r"[A-Za-z' *-]{1,60}", label)):
        return False
    if not re.fullmatch(r"[A-Za-z' ,*-]*", rest):
        return False
    said = [word for word in re.split(r"[\s,*]+", rest) if word]
    said = " ".join(said).replace("at least", "").replace("at most", "").split()
    return all(_leads(said, index) for index in range(len(said)))


def _leads(said: list[str], index: int) -> bool:
    """Whether a word only leads to the number: a listed one, a name as subject, or a thing that is so many."""
    word = said[index].lower()
    if word in LEAD:
        return True
    if word in BLOCKERS or not word.isalpha() or index + 1 == len(said):
        return False
    is_subject = said[index][0].isupper() and all(before.lower() in _CONNECTIVES for before in said[:index])
    is_counted = index > 0 and said[index - 1].lower() in _OPENERS and said[-1].lower() in _IS
    return is_subject or is_counted


def begins_with_unit(text: str) -> bool:
    """Whether a text that follows a number without a space begins with a unit (540m)."""
    match = _WORD.match(text)
    return match is not None and is_unit(match["word"])


def is_unit(word: str) -> bool:
    low = word.lower()
    singular = {low, low.removesuffix("s"), low.removesuffix("es")}
    return word in UNITS or (len(low) > 2 and (bool(singular & UNITS) or bool(known(word))))


def words_after(text: str) -> tuple[tuple[str, int], ...] | None:
    """The words behind a number with their powers, "/" one of them; None where other things stand there."""
    text = _IS_IT.sub("", text.strip().rstrip("!").strip())
    text = re.sub(r"[(),]", " ", text)
    found: list[tuple[str, int]] = []
    place = 0
    while place < len(text):
        if text[place] in " /*":
            if text[place] == "/":
                found.append(("/", 1))
            place += 1
            continue
        match = _WORD.match(text, place)
        if match is None:
            return None
        found.append((match["word"], int(re.sub(r"[\^{}]", "", match["power"])) if match["power"] else 1))
        place = match.end()
    return tuple(found)


def allowed_after(found: Sequence[tuple[str, int]], value: float) -> bool:
    """Whether the words behind a number are units, things that are counted, or where and when they are."""
    return all(_fits(found, index, value) for index in range(len(found)))


def _fits(found: Sequence[tuple[str, int]], index: int, value: float) -> bool:
    word, power = found[index]
    low = word.lower()
    before = found[index - 1][0].lower() if index else ""
    if word == "/" or is_unit(word) or (low in RAISED and is_unit(before)):
        return True
    number = word_number(low)
    if number is not None and low != "one":
        return number == value
    if low in BLOCKERS or power != 1:
        return False
    if low in _MORE or is_plural(low):
        return True
    follows = found[index + 1][0] if index + 1 < len(found) else ""
    counted = is_plural(follows.lower()) or follows.lower() in ("people", "men", "women", "children", "feet")
    return (
        len(low) > 1
        and low.replace("-", "").isalpha()
        and (before in _OPENERS or before == "/" or counted or (abs(value) <= 1 and index == 0))
    )


def is_plural(word: str) -> bool:
    return (
        len(word) > 2
        and word.endswith("s")
        and not word.endswith("ss")
        and word.replace("-", "").isalpha()
        and word not in _NO_NOUNS
    )
