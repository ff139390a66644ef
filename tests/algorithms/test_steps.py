"""Where steps end, as a reader would say; and in work that grows with the text alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.algorithms import steps
from rairl_ray.algorithms.steps import WINDOW, step_ends

# One text a line; ¦ marks every end, which a reader set by hand. What follows the last one is unfinished.
ABBREVIATIONS = r"""
It is 3.5 kg.¦ So 2 * 3.5 = 7.¦
Mr. Smith has 3 apples.¦ Mrs. Jones has 4.¦
Dr. Lee sees 12 patients a day.¦ How many in a week?¦
Mr. Smith vs. Dr. No, e.g. the U.S. End.¦
Use small primes, e.g. 2 and 3.¦ Then go on.¦
The legs, i.e. the short sides, are 3 and 4.¦
He bought apples, pears, etc. and paid 5 dollars.¦
He bought apples, pears, etc.¦ Then he paid.¦
Approx. 40 percent of them stayed.¦
See Smith et al. (2010) for a proof.¦
see No. 5 and fig. 2.¦ He said no.¦ Then he left
By Eq. 3 and Thm. 2 the sum is 10.¦ Done.¦
The shop opens at 9 a.m. and closes at 5 p.m. every day.¦
The shop closes at 5 p.m.¦ After that nobody works.¦
Acme Inc. sold 40 units.¦ Beta Co. sold 50.¦
The board is 5 in. wide and 2 ft. long.¦
It weighs 20 lbs.¦ The box adds 2 more.¦
He came in.¦ then he left.¦
Each lap takes 2 min. and 30 sec. on average.¦
On Jan. 5 she had 12 books;¦ on Feb. 7 she had 20.¦
She holds a Ph.D. in physics.¦ He has a Ph.D.¦ They met.¦
Martin Luther King Jr. spoke for 17 minutes.¦
St. Louis has 12 parks.¦
The U.S. team won 39 medals.¦
"""
NAMES = r"""
J. K. Rowling wrote 7 books.¦ How many pages is that?¦
John F. Kennedy was born in 1917.¦
George W. Bush and Al Gore ran.¦
Dr. J. Smith counted 8 birds.¦
The answer is B.¦ Therefore we stop.¦
"""
LETTERS = r"""
So the answer is C.¦ Options A and B are wrong.¦
We choose option D.¦ Nothing else fits.¦
Consider triangle A.¦ Triangle B is larger.¦
He lacks vitamin C.¦ Scurvy follows.¦
A. 5 B. 6 C. 7
The set is S.¦ It has 4 elements.¦
"""
FACTORIALS = r"""
so 5! = 120 ways.¦ Yes.¦
There are 5! ways to seat them.¦
Then n! / k! is an integer.¦
We need 4! 3! 2! in all.¦
The number is (n-1)! because one seat is fixed.¦
That is 10!¦ What a number.¦
We get 6! - 5! = 600.¦
Great!¦ Now we add 3.¦
Wow!¦ that was easy.¦
7!! = 105 is a double factorial.¦
What?!¦ No.¦
"""
LATEX = r"""
So $a\; b$ and $c\! d$ are spaced.¦ Next.¦
We have \int_0^1 x\, dx = \frac{1}{2}.¦ Then \[ y = 2 \].¦
Take \left. \frac{1}{x} \right| at 1.¦
Let 1, 2, \ldots, n be given.¦ Add them.¦
It holds that 5! \cdot 2 = 240.¦
If x &lt; 3 and y &amp; z hold, stop.¦
\(x = 2\).¦ \(y = 3\).¦
"""
LISTS = r"""
1. first thing.¦ 2. second.¦ third
- item one.¦ - item two.¦
Step 1. Add 3 and 4.¦ Step 2. Multiply by 2.¦
1.2. The base case.¦ It holds.¦
(a) x = 3.¦ (b) y = 4.¦
ii. the second case.¦ iii. the third case.¦
**Step 3.** Divide by 2.¦ **Done.**¦ x
a;¦ b!¦ c?¦ d
wait...¦ what?!¦ ok
1 + 2 + ... + 10 = 55.¦ Good.¦
The list 1, 2, ... 9 has 9 entries.¦
He said "stop."¦ (She left.)¦ Then he went
at example.com or v1.2.3 we go.¦ x
The answer is 12.¦ It is even.¦
"""
OTHER_SCRIPTS = r"""
小明有3个苹果。¦他又买了4个。¦一共7个。¦
答案是7！¦对吗？¦对。¦
圆周率是3.14。¦「好。」¦他说。¦
先算a；¦再算b。¦
答えは5です。¦次に進みます。¦
उत्तर 5 है।¦ अब जोड़ो।¦
كم العدد؟¦ خمسة.¦
"""
TAGS = r"""
The answer is B.¦</think>¦<answer>B</answer>¦
<think>It is 4.¦ So 8.¦</think>¦
<think></think>¦
<think><answer>  
"""
SENTENCES = [
    line
    for group in (ABBREVIATIONS, NAMES, LETTERS, FACTORIALS, LATEX, LISTS, OTHER_SCRIPTS, TAGS)
    for line in group.strip().splitlines()
]


@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences_end_where_a_reader_ends_them(marked: str) -> None:
    text = marked.replace("¦", "")
    ends = step_ends(text)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert "¦".join(pieces) == marked


def test_there_are_enough_of_them() -> None:
    assert len(set(SENTENCES)) >= 75


class Counted(str):
    """A text that counts the characters that are taken out of it."""

    taken = 0

    def __getitem__(self, key: object) -> str:  # type: ignore[override]
        part = super().__getitem__(key)  # type: ignore[index]
        self.taken += max(1, len(part))
        return part


PIECES = [
    "\n",
    "!",
    "...",
    ". ",
    "a",
    "5! ",
    "J. ",
    "<think>",
    "</think>",
    "\\;",
    "1. ",
    "。",
    ")",
    " ",
    "e.g. ",
    ";\n",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), st.integers(1, 300), st.text(max_size=2))
def test_the_work_grows_with_the_text_alone(pieces: list[str], times: int, end: str) -> None:
    """Every look at the text is a slice of at most 2 WINDOW a stop, or a gap between stops, each read once.

    The one scan over the whole text is linear by its form: see the next test.
    """
    text = Counted("".join(pieces) * times + end)
    ends = step_ends(text)
    stops = len(steps._BREAK.findall(text))
    assert text.taken <= len(text) + (2 * WINDOW + 3) * stops
    assert ends == sorted(set(ends)) and all(0 < e <= len(text) for e in ends)


@given(st.sampled_from("\n.!?;。！？；।؟۔"), st.text(alphabet="\n .!?;)\"'a5<。", max_size=30))
def test_the_scan_never_goes_back(first: str, rest: str) -> None:
    """A match cannot fail once its first character fits, so nothing is read again (tags are short)."""
    match = steps._BREAK.match(first + rest)
    assert match is not None and match.end() > 0


def test_a_mark_alone_is_a_step_and_an_empty_line_is_none() -> None:
    assert step_ends("\n\nSo 3.\n") == [7]
    assert step_ends("?\n") == [2] and step_ends("Mr.\n") == [4]
    assert step_ends("He met Dr . Then he left.") == [11, 25]
