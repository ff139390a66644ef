"""Units of measure: what the words behind a number measure, so that 15 m^2 is no 15 cm^2.

A unit is read as a product of known ones, with a factor to compare those of one kind: 2 hours are 120 minutes.
Words that are no unit here (apples, people) measure nothing that could be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rairl_ray.data.notation import words

Powers = tuple[tuple[str, int], ...]


class Unit(NamedTuple):
    """One reading of a unit: its size, and the powers of what it measures."""

    factor: Fraction
    powers: Powers
    rate_factor: Fraction
    rate: Powers
    """What words divide by: the day of `5 dollars a day`, which may be left unsaid (`_COUNTED`)."""


Units = tuple[Unit, ...]
"""All readings: a pound is money or mass. Empty: nothing that can be compared."""

_LINES = """
    m 1 m meter metre
    m 0.0254 in inch inche
    m 0.3048 ft foot feet
    m 0.9144 yd yard
    m 1609.344 mi mile
    kg 0.001 g gram gramme
    kg 0.45359237 lb lbs pound
    kg 0.028349523125 oz ounce
    ton 1 t ton tonne
    s 1 s sec second
    s 60 min minute
    s 3600 h hr hour
    s 86400 d day
    s 604800 wk week
    month 1 mo month
    month 12 y yr year
    month 120 decade
    month 1200 century centurie
    usd 1 $ usd dollar
    usd 0.01 ¢ c cent
    usd 0.05 nickel
    usd 0.1 dime
    eur 1 € eur euro
    gbp 1 £ gbp pound
    gbp 0.01 pence
    yen 1 ¥ jpy cny yen yuan
    inr 1 ₹ inr rs rupee
    chf 1 chf
    degree 1 ° deg degree
    celsius 1 ° °C ℃ C degree celsius
    fahrenheit 1 ° °F ℉ F degree fahrenheit
    kelvin 1 K kelvin
    rad 1 rad radian
    m3 0.001 L l liter litre
    m3 0.003785411784 gal gallon
    m3 0.000946352946 qt quart
    m3 0.000473176473 pt pint
    m3 0.0002365882365 cup
    m3 0.00001478676478125 tbsp tablespoon
    m3 0.00000492892159375 tsp teaspoon
    m2 4046.8564224 acre
    m2 10000 ha hectare
    bit 1 bit
    bit 8 byte B
    bit 8000 KB
    mol 1 mol mole
    A 1 A amp ampere
    Hz 1 Hz hertz
    N 1 N newton
    J 1 J joule
    J 4.184 cal calorie
    J 3600 Wh
    W 1 W watt
    Pa 1 Pa pascal
    Pa 100000 bar
    Pa 101325 atm atmosphere
    V 1 V volt
    ohm 1 Ω ohm
"""
_PREFIXES = {
    "k": Fraction(1000), "M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12),
    "d": Fraction(1, 10), "c": Fraction(1, 100), "m": Fraction(1, 1000), "µ": Fraction(1, 10**6),
    "μ": Fraction(1, 10**6), "u": Fraction(1, 10**6), "n": Fraction(1, 10**9),
}  # fmt: skip
_PREFIX_WORDS = {
    "kilo": "k", "mega": "M", "giga": "G", "tera": "T", "deci": "d", "centi": "c", "milli": "m", "micro": "u",
    "nano": "n",
}  # fmt: skip
_PREFIXED = "m g s L l Hz N J W Wh Pa V A Ω B cal mol"
_PREFIXED_WORDS = (
    "meter metre gram gramme second liter litre hertz newton joule watt pascal volt amp byte bit calorie ohm"
)
_PARTS = {
    "N": {"kg": 1, "m": 1, "s": -2}, "J": {"kg": 1, "m": 2, "s": -2}, "W": {"kg": 1, "m": 2, "s": -3},
    "Pa": {"kg": 1, "m": -1, "s": -2}, "Hz": {"s": -1}, "m2": {"m": 2}, "m3": {"m": 3},
}  # fmt: skip
_SHORT = {
    "mph": "mi / h", "kph": "km / h", "kmh": "km / h", "kmph": "km / h", "fps": "ft / s", "mps": "m / s",
    "mpg": "mi / gal", "cc": "cubic cm",
}  # fmt: skip
_RAISING = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
RAISED = {"squared": 2, "cubed": 3}
_SKIPPED = words("more fewer less extra additional full whole total US U.S American")
_ARTICLES = ("a", "an", "each", "every")
_CODES = {"usd": "$", "eur": "€", "gbp": "£", "inr": "₹", "rs": "₹", "jpy": "¥", "cny": "¥", "rmb": "¥"}
_MONEY = {"usd", "eur", "gbp", "yen", "inr", "chf"}
_COUNTED = {((name, 1),) for name in (*_MONEY, "s", "month")}
"""What is paid or spent: `$5` for `$5 a day`, where 5 m for 5 m a second are another thing."""
_TEMPERATURES = {"celsius", "fahrenheit", "kelvin"}

Sized = tuple[Fraction, str]


def _table() -> dict[str, list[Sized]]:
    table: dict[str, list[Sized]] = {}
    for line in _LINES.strip().split("\n"):
        measures, number, *spelled = line.split()
        for name in spelled:
            table.setdefault(name, []).append((Fraction(number), measures))
    plain = list(table)
    for names, prefixes in (
        (_PREFIXED, _PREFIXES),
        (_PREFIXED_WORDS, {word: _PREFIXES[short] for word, short in _PREFIX_WORDS.items()}),
    ):
        for name in names.split():
            for prefix, size in prefixes.items():
                if prefix + name not in plain:  # min, cd and ft are no prefixed units
                    table[prefix + name] = [(factor * size, measures) for factor, measures in table[name][:1]]
    return table


_UNITS = _table()


def known(word: str) -> list[Sized]:
    """Sizes of the units that a word may mean; none for a word that is no unit here."""
    word = word.rstrip(".")
    names = [word, word.lower()]
    if len(word) > 2:
        names += [name.removesuffix("s") for name in names]
    return next((_UNITS[name] for name in names if name in _UNITS), [])


def is_money(word: str) -> bool:
    return any(measures in _MONEY for _, measures in known(word))


@lru_cache(maxsize=4096)
def units_of(said: tuple[tuple[str, int], ...], currency: str = "") -> Units:
    """The units that the words behind a number begin with.

    Args:
        said: words with their powers; "/" and "per" divide by what follows.
        currency: sign or code beside the number; A$ and the like are dollars.
    """
    parts = [pair for word, power in said for pair in _spelled(word, power)]
    factors: list[tuple[list[Sized], int, bool]] = []
    place, sign, spoken, raising = 0, 1, False, 1
    if currency:
        code = currency.lower().rstrip(".")
        factors.append((known(_CODES.get(code, code[-1] if code[-1] in _UNITS else code)), 1, False))
        while place < len(parts) and (parts[place][0] in _SKIPPED or is_money(parts[place][0])):
            place += 1
    while place < len(parts):
        word, power = parts[place]
        low = word.lower().rstrip(".")
        follows = parts[place + 1][0] if place + 1 < len(parts) else ""
        found = known(word)
        if word in _SKIPPED and not factors:
            pass
        elif low in ("/", "per") or (low in _ARTICLES and factors and known(follows)):
            sign, spoken = -1, low != "/"
        elif low in _RAISING and known(follows):
            raising = _RAISING[low]
        elif found and not (low == "in" and power == 1 and follows.lower() not in ("", "/", "per", *RAISED)):
            if _measures(found, {"degree"}) and _measures(known(follows), _TEMPERATURES):
                found, place = known(follows), place + 1
            elif follows.lower() in RAISED:
                raising, place = RAISED[follows.lower()], place + 1
            factors.append((found, sign * power * raising, spoken))
            raising = 1
        else:
            break
        place += 1
    return _readings(factors)


def _measures(found: Sequence[Sized], what: Collection[str]) -> bool:
    return any(measures in what for _, measures in found)


def _spelled(word: str, power: int) -> list[tuple[str, int]]:
    """A word as it is, or the units that it is short for."""
    short = _SHORT.get(word.lower().rstrip("."), "").split()
    return [(part, 1) for part in short] or [(word, power)]


def _readings(factors: Sequence[tuple[list[Sized], int, bool]]) -> Units:
    if not factors or not factors[0][0]:
        return ()
    readings = itertools.product(*(options for options, _, _ in factors[:6]))
    return tuple(_unit(reading, factors) for reading in itertools.islice(readings, 16))


def _unit(reading: Sequence[Sized], factors: Sequence[tuple[list[Sized], int, bool]]) -> Unit:
    sizes = {False: Fraction(1), True: Fraction(1)}
    powers: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for (size, measures), (_, power, spoken) in zip(reading, factors, strict=False):
        power = max(-9, min(9, power))
        sizes[spoken] *= size**power
        for name, times in _PARTS.get(measures, {measures: 1}).items():
            powers[spoken][name] = powers[spoken].get(name, 0) + times * power
    return Unit(sizes[False], _sorted(powers[False]), sizes[True], _sorted(powers[True]))


def _sorted(powers: Mapping[str, int]) -> Powers:
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def ratio(gold: Units, answer: Units) -> Fraction | None:
    """What an answer's number is to be multiplied with before it is compared with gold's.

    None where they measure different things. Where one of them names no unit that is known, the numbers alone
    are compared.
    """
    if not gold or not answer:
        return Fraction(1)
    pairs = list(itertools.product(gold, answer))
    for one, other in pairs:
        if _whole(one) == _whole(other):
            return other.factor * other.rate_factor / (one.factor * one.rate_factor)
    for one, other in pairs:
        if one.powers == other.powers and not (one.rate and other.rate) and one.powers[:1] in _COUNTED:
            return other.factor / one.factor
    return None


def _whole(unit: Unit) -> Powers:
    together = dict(unit.powers)
    for name, power in unit.rate:
        together[name] = together.get(name, 0) + power
    return _sorted(together)
