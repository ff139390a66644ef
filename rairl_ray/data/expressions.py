"""Mathematical expressions in plain notation: a whole text is parsed, or none of it is understood."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rairl_ray.data.notation import GREEK, words

MAX_LENGTH = 400
MAX_DEPTH = 40

Node = tuple[Any, ...]
"""(kind, ...): num value; var name; add, mul, div, pow, fact, neg, call (name, argument), root, log, binom."""


class Refused(ValueError):
    """Not an expression, or one without a value that can be computed."""


FUNCTIONS = words(
    """
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp lg sqrt abs floor ceil
    """
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^_!(){}\[\]|°,]|\\[{}]))"
)
_CONSTANTS = {"\\pi": "pi", "pi": "pi", "e": "e", "i": "i"}
_ENGLISH = words(
    """
    and or not the for but per are was has had all any one two six ten is to of in if so we at by
    """
)


@dataclass
class _Parser:
    tokens: list[tuple[str, str, bool]]
    """(kind, text, whether a space stands before)"""
    place: int = 0
    depth: int = 0

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self, text: str | None = None) -> str:
        token = self.peek()
        if not token or (text is not None and token != text):
            raise Refused(text or "end")
        self.place += 1
        return token

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("depth")
        node = self.product()
        while self.peek() in ("+", "-"):
            node = ("add", node, self.product() if self.take() == "+" else ("neg", self.product()))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            token = self.peek()
            if token == "*":
                self.take()
                node = ("mul", node, self.signed())
            elif token in ("/", "\\div"):
                self.take()
                node = ("div", node, self.signed())
            elif self._starts():
                node = self._beside(node)
            else:
                return node

    def _starts(self) -> bool:
        """Whether a factor stands here without an operator."""
        if self.kind() == "number":
            if self.place and self.tokens[self.place - 1][0] == "number":
                raise Refused("two numbers side by side")
            return self.place > 0 and self.tokens[self.place - 1][1] in (")", "}", "]")
        return (self.kind() in ("command", "word") and self.peek() != "\\div") or self.peek() in ("(", "[", "{")

    def _beside(self, node: Node) -> Node:
        """A product without an operator, or a mixed number: 1\\frac{4}{5}."""
        whole = node[0] == "num" and node[1].denominator == 1 and self.peek() == "\\frac"
        factor = self.power()
        if (
            whole
            and factor[0] == "div"
            and factor[1][0] == factor[2][0] == "num"
            and factor[1][1] < factor[2][1]
        ):
            return ("add", node, factor)
        return ("mul", node, factor)

    def signed(self) -> Node:
        if self.peek() == "-":
            self.take()
            return ("neg", self.signed())
        if self.peek() == "+":
            self.take()
            return self.signed()
        return self.power()

    def power(self) -> Node:
        node = self.base()
        while True:
            if self.peek() == "!":
                self.take()
                node = ("fact", node)
            elif self.peek() == "°":
                self.take()
            elif self.peek() in ("^", "**"):
                self.take()
                return ("pow", node, self.group(signed=True))
            else:
                return node

    def group(self, signed: bool = False, digit: bool = False) -> Node:
        """{...}, or a single token; `digit`: as LaTeX does, one digit of a number alone."""
        if self.peek() == "{":
            self.take()
            node = self.sum()
            self.take("}")
            return node
        if signed and self.peek() == "-":
            self.take()
            return ("neg", self.group(signed=True))
        if digit and self.kind() == "number" and len(self.peek()) > 1:
            kind, text, space = self.tokens[self.place]
            if not text.isdigit():
                raise Refused(text)
            self.tokens[self.place] = (kind, text[1:], space)
            return ("num", Fraction(int(text[0])))
        return self.power() if signed and self.kind() == "number" else self.base()

    def base(self) -> Node:
        kind, token = self.kind(), self.take()
        if kind == "number":
            return ("num", Fraction(token.replace(",", "")))
        closing = {"(": ")", "[": "]", "{": "}", "|": "|"}.get(token)
        if closing is not None:
            node = self.sum()
            self.take(closing)
            return ("call", "abs", node) if token == "|" else node
        if kind == "command":
            return self._command(token)
        if kind == "word":
            return self._word(token)
        raise Refused(token)

    def _command(self, token: str) -> Node:
        name = token[1:]
        if name == "frac":
            top = self.group(digit=True)
            return ("div", top, self.group(digit=True))
        if name == "binom":
            top = self.group(digit=True)
            return ("binom", top, self.group(digit=True))
        if name == "sqrt":
            degree: Node = ("num", Fraction(2))
            if self.peek() == "[":
                self.take()
                degree = self.sum()
                self.take("]")
            return ("root", self.group(digit=True), degree)
        if token in _CONSTANTS:
            return ("const", _CONSTANTS[token])
        if name in GREEK:
            return ("var", self._indexed(name))
        if name in FUNCTIONS:
            return self._function(name)
        raise Refused(token)

    def _word(self, token: str) -> Node:
        if token in FUNCTIONS:
            return self._function(token)
        if token in _CONSTANTS:
            return ("const", _CONSTANTS[token])
        # Letters side by side are a product of variables; capitals side by side name a thing (the segment AB).
        if len(token) > 3 or token.lower() in _ENGLISH or (len(token) > 1 and token.isupper()):
            raise Refused(token)
        if len(token) > 1:
            self.place -= 1
            self.tokens[self.place : self.place + 1] = [("word", letter, False) for letter in token]
            self.place += 1
        letter = token[0]
        return ("const", letter) if letter in _CONSTANTS else ("var", self._indexed(letter))

    def _indexed(self, name: str) -> str:
        if self.peek() != "_":
            return name
        self.take()
        if self.peek() != "{":
            return f"{name}_{self.take()}"
        self.take()
        index = ""
        while self.peek() != "}":
            index += self.take()
        self.take()
        return f"{name}_{index}"

    def _function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        for _ in range(2):
            if self.peek() == "_" and name == "log":
                self.take()
                base = self.group(digit=True)
            elif self.peek() == "^":
                self.take()
                exponent = self.group(signed=True)
        if self.peek() in ("(", "{", "[") or (self.kind() == "command" and self.peek() in ("\\frac", "\\sqrt")):
            argument = self.power()
        else:
            argument = self.signed()
            while self._starts() and self.peek()[1:] not in FUNCTIONS and self.peek() not in ("(", *FUNCTIONS):
                argument = self._beside(argument)
        node: Node = ("log", argument, base) if base is not None else ("call", name, argument)
        if exponent == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("call", f"arc{name}", argument)
        return node if exponent is None else ("pow", node, exponent)


@lru_cache(maxsize=4096)
def parse(text: str) -> Node | None:
    """The expression that ALL of a plain text is; None for anything else."""
    if len(text) > MAX_LENGTH:
        return None
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind], text[place].isspace()))
        place = match.end()
    parser = _Parser(tokens)
    try:
        node = parser.sum()
        return node if parser.place == len(tokens) else None
    except (Refused, RecursionError):
        return None


def variables(node: Node) -> frozenset[str]:
    if node[0] == "var":
        return frozenset((node[1],))
    return frozenset().union(*(variables(part) for part in node[1:] if isinstance(part, tuple)))
