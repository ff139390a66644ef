"""Values of expressions decide equality, and nothing is simplified.

Constants are exact fractions where they can be, else numbers of 40 digits; expressions with variables are
compared at a few fixed points. Every size is bounded before it is computed: nothing can stall, so nothing
needs a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import isqrt
from typing import Any

from mpmath.ctx_mp import MPContext

from rairl_ray.data.expressions import Node, Refused, variables
from rairl_ray.keys import keyed_random

MAX_BITS = 20_000
"""Of an exact number; larger ones are compared by 40 digits."""
MAX_EXPONENT_BITS = 2_000_000
"""Of a number of 40 digits; what is larger has no value here."""
POINTS = 8

_CONTEXT = MPContext()
_CONTEXT.dps = 40
_LOCK = threading.Lock()
"""mpmath changes its precision while it works."""


def rational(node: Node) -> Fraction | None:
    """The exact value of a constant expression; None where it is none, irrational or too large."""
    try:
        return _exact(node)
    except (Refused, ZeroDivisionError):
        return None


def _exact(node: Node) -> Fraction:
    match node:
        case ("num", value):
            return _bounded(value)
        case ("neg", a):
            return -_exact(a)
        case ("add", a, b):
            return _bounded(_exact(a) + _exact(b))
        case ("mul", a, b):
            return _bounded(_exact(a) * _exact(b))
        case ("div", a, b):
            return _bounded(_exact(a) / _exact(b))
        case ("pow", a, b):
            base, exponent = _exact(a), _exact(b)
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS:
                raise Refused("power")
            return base ** int(exponent)
        case ("fact", a):
            return Fraction(_factorial(_exact(a)))
        case ("binom", a, b):
            n, k = _exact(a), _exact(b)
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 500:
                raise Refused("binomial")
            return Fraction(_factorial(n), _factorial(k) * _factorial(n - k))
        case ("root", a, b):
            return _exact_root(_exact(a), _exact(b))
    raise Refused(str(node[0]))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 2 * MAX_BITS:
        raise Refused("size")
    return value


def _factorial(value: Fraction) -> int:
    if value.denominator != 1 or not 0 <= value <= 500:
        raise Refused("factorial")
    product = 1
    for factor in range(2, int(value) + 1):
        product *= factor
    return product


def _exact_root(value: Fraction, degree: Fraction) -> Fraction:
    if degree != 2 or value < 0:
        raise Refused("root")
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    if top * top != value.numerator or bottom * bottom != value.denominator:
        raise Refused("irrational")
    return Fraction(top, bottom)


_CALLS: dict[str, Callable[[Any], Any]] = {
    **{name: getattr(_CONTEXT, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: getattr(_CONTEXT, name) for name in ("sinh", "cosh", "tanh")},
    "arcsin": _CONTEXT.asin, "arccos": _CONTEXT.acos, "arctan": _CONTEXT.atan, "ln": _CONTEXT.ln,
    "log": lambda x: _CONTEXT.log(x, 10), "lg": lambda x: _CONTEXT.log(x, 10), "exp": _CONTEXT.exp,
    "sqrt": _CONTEXT.sqrt, "abs": abs, "floor": _CONTEXT.floor, "ceil": _CONTEXT.ceil,
}  # fmt: skip


def _number(node: Node, point: Mapping[str, Any]) -> Any:
    """The value with 40 digits at a point; complex where it must be."""
    match node:
        case ("num", value):
            return _CONTEXT.mpf(value.numerator) / value.denominator
        case ("const", name):
            return {"pi": +_CONTEXT.pi, "e": +_CONTEXT.e, "i": _CONTEXT.mpc(0, 1)}[name]
        case ("var", name):
            return point[name]
        case ("neg", a):
            return -_number(a, point)
        case ("add", a, b):
            return _number(a, point) + _number(b, point)
        case ("mul", a, b):
            return _number(a, point) * _number(b, point)
        case ("div", a, b):
            return _number(a, point) / _number(b, point)
        case ("pow", a, b):
            return _power(_number(a, point), _number(b, point))
        case ("root", a, b):
            return _power(_number(a, point), 1 / _number(b, point))
        case ("fact", a):
            return _gamma(_number(a, point))
        case ("binom", a, b):
            n, k = _number(a, point), _number(b, point)
            return _gamma(n) / _gamma(k) / _gamma(n - k)
        case ("log", a, b):
            return _CONTEXT.ln(_number(a, point)) / _CONTEXT.ln(_number(b, point))
        case ("call", name, a):
            value = _number(a, point)
            if name not in ("ln", "log", "lg", "abs", "sqrt") and abs(value) > 10**6:
                raise Refused("size")
            return _CALLS[name](value)
    raise Refused(str(node[0]))


def _power(base: Any, exponent: Any) -> Any:
    if base == 0:
        if _CONTEXT.re(exponent) <= 0:
            raise Refused("zero")
        return base
    if abs(exponent) > 10**9 or abs(exponent) * (abs(_CONTEXT.mag(base)) + 1) > MAX_EXPONENT_BITS:
        raise Refused("size")
    return base**exponent


def _gamma(value: Any) -> Any:
    if abs(value) > 10_000:
        raise Refused("size")
    return _CONTEXT.factorial(value)


def _at(node: Node, point: Mapping[str, Any]) -> Any | None:
    try:
        value = _number(node, point)
        return value if _CONTEXT.isfinite(value) else None
    except (Refused, ArithmeticError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _points(names: frozenset[str]) -> list[dict[str, Any]]:
    if not names:
        return [{}]
    points = []
    for index in range(POINTS):
        point = {}
        for name in names:
            value = Fraction(keyed_random("probe", name, index).randint(300, 2700), 1009)
            point[name] = _CONTEXT.mpf(value.numerator) / value.denominator * (-1 if index % 2 else 1)
        points.append(point)
    return points


def _same(a: Any, b: Any) -> bool:
    return abs(a - b) <= _CONTEXT.mpf(10) ** -25 * max(abs(a), abs(b))


def equal(a: Node, b: Node) -> bool:
    """Whether two expressions have the same value wherever both have one (and both have one somewhere)."""
    exact = rational(a), rational(b)
    if exact[0] is not None and exact[1] is not None:
        return exact[0] == exact[1]
    ratio = proportion(a, b)
    return ratio is not None and _same(ratio, 1)


def proportion(a: Node, b: Node) -> Any | None:
    """The constant a / b, where that is one and not 0; None where it is not. Both 0 everywhere: 1."""
    names = variables(a) | variables(b)
    ratios = []
    with _LOCK:
        for point in _points(names):
            first, second = _at(a, point), _at(b, point)
            if first is None and second is None:
                continue
            if first is None or second is None or _is_zero(first, names) != _is_zero(second, names):
                return None
            ratios.append(_CONTEXT.mpf(1) if _is_zero(first, names) else first / second)
    if len(ratios) < (3 if names else 1) or not all(_same(ratio, ratios[0]) for ratio in ratios):
        return None
    return ratios[0]


def _is_zero(value: Any, names: frozenset[str]) -> bool:
    """Exactly, or (with variables, which are of the size of 1) what is left of a difference."""
    return bool(value == 0 or (names and abs(value) < _CONTEXT.mpf(10) ** -30))


def digits(node: Node) -> str | None:
    """A constant to 15 digits: equal constants are equal strings. None for anything with variables."""
    if variables(node):
        return None
    with _LOCK:
        value = _at(node, {})
        return None if value is None else str(_CONTEXT.nstr(value, 15))


# --- canonical forms ------------------------------------------------------------------------------

Polynomial = dict[tuple[tuple[str, int], ...], Fraction]
"""Sorted powers of variables -> coefficient, never 0."""
MAX_TERMS = 60


def canonical(node: Node) -> str | None:
    """Equal constants and equal polynomials are equal strings; anything else by its value at a fixed point."""
    exact = rational(node)
    if exact is not None:
        return str(exact)
    names = variables(node)
    if not names:
        return digits(node)
    polynomial = expanded(node)
    if polynomial is not None:
        return written(polynomial)
    with _LOCK:
        value = _at(node, _points(names)[0])
        return None if value is None else f"{', '.join(sorted(names))} -> {_CONTEXT.nstr(value, 12)}"


def expanded(node: Node) -> Polynomial | None:
    """All products multiplied out; None for what is no polynomial with rational coefficients, or too large."""
    try:
        return _expanded(node)
    except (Refused, ZeroDivisionError):
        return None


def _expanded(node: Node) -> Polynomial:
    if not variables(node):
        value = _exact(node)
        return {(): value} if value else {}
    match node:
        case ("var", name):
            return {((name, 1),): Fraction(1)}
        case ("neg", a):
            return {powers: -value for powers, value in _expanded(a).items()}
        case ("add", a, b):
            return _collected([*_expanded(a).items(), *_expanded(b).items()])
        case ("mul", a, b):
            return _product(_expanded(a), _expanded(b))
        case ("div", a, b) if not variables(b):
            return {powers: value / _exact(b) for powers, value in _expanded(a).items()}
        case ("pow", a, ("num", exponent)) if exponent.denominator == 1 and 0 <= exponent <= 20:
            power: Polynomial = {(): Fraction(1)}
            for _ in range(int(exponent)):
                power = _product(power, _expanded(a))
            return power
    raise Refused(str(node[0]))


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    terms = []
    for first, x in a.items():
        for second, y in b.items():
            powers = dict(first)
            for name, power in second:
                powers[name] = powers.get(name, 0) + power
            terms.append((tuple(sorted(powers.items())), _bounded(x * y)))
    return _collected(terms)


def _collected(terms: list[tuple[tuple[tuple[str, int], ...], Fraction]]) -> Polynomial:
    total: Polynomial = {}
    for powers, value in terms:
        total[powers] = total.get(powers, Fraction(0)) + value
    if len(total) > MAX_TERMS:
        raise Refused("terms")
    return {powers: value for powers, value in total.items() if value}


def written(polynomial: Polynomial) -> str:
    """`x^2 - 2*x + 1`: highest powers first."""
    text = ""
    for powers, value in sorted(polynomial.items(), key=lambda item: (-sum(p for _, p in item[0]), item[0])):
        factors = [name if power == 1 else f"{name}^{power}" for name, power in powers]
        if abs(value) != 1 or not factors:
            factors.insert(0, str(abs(value)))
        sign = "-" if value < 0 else "+"
        text += f" {sign} {'*'.join(factors)}" if text else f"{'-' if value < 0 else ''}{'*'.join(factors)}"
    return text or "0"
