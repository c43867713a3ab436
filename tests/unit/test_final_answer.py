"""Where final results stand, and numbers as sentences write them: known texts, and long ones that must take no time."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from dgd_lightning.scoring.final_answer import Kind, final_answer
from dgd_lightning.scoring.latex import normalised, plain_number
from dgd_lightning.scoring.numerals import numerals, plain_digits


@pytest.mark.parametrize(
    ("answer", "kind", "found", "place"),
    [
        (r"\boxed{1} no, \boxed{\frac{1}{\sqrt{2}}}", "formula", r"\frac{1}{\sqrt{2}}", "boxed"),
        (r"\boxed{5} and then \boxed{}", "formula", "5", "boxed"),  # an empty one does not count
        (r"\boxed{5} and then \boxed{6", "formula", "5", "boxed"),  # nor one that is cut off,
        (r"So $\boxed{\frac{1}{2}$.", "formula", r"\frac{1}{2}", "boxed"),  # if there is another
        (r"\boxed 7", "formula", "7", "boxed"),
        (r"\framebox {7}", "formula", "7", "boxed"),
        (r"\boxed{\{1, 2\}}", "formula", r"\{1, 2\}", "boxed"),
        (r"So $x=\boxed{1}$ or $x=\boxed{-2}$.", "formula", "x=1, x=-2", "boxed"),
        (r"$\boxed{3}$, $\boxed{5}$, and $\boxed{7}$", "formula", "3, 5, 7", "boxed"),
        (r"$$\boxed{1} \quad \text{or} \quad \boxed{2}$$", "formula", "1, 2", "boxed"),
        (r"\boxed{3} + \boxed{4} = \boxed{7}", "formula", "7", "boxed"),
        ("Step 1: \\boxed{3}\nStep 2: \\boxed{4}", "formula", "4", "boxed"),
        (r"\boxed{3} and \boxed{4}", "number", "4", "boxed"),  # a number is one
        ("<think>\\boxed{1}</think> The answer is 2.", "formula", "2", "said"),
        ("#### Step 2: multiply\nSo $x = 12$.", "formula", "x = 12", "formula"),
        ("#### $\\frac{1}{2}$", "formula", r"\frac{1}{2}", "####"),
        ("So $x=12$. I checked it: the answer is correct.", "formula", "x=12", "formula"),
        ("So $x=12$. The answer is a bit surprising.", "formula", "x=12", "formula"),
        ("The answer is 12, as shown above.", "formula", "12", "said"),
        ("The answer is 12. No, that is wrong: the answer is 13.", "number", "13", "said"),  # on one line
        ("The answer is 12 or 13.", "number", "12 or 13", "said"),  # neither: it is not known which
        ("It is between 12 and 15. The answer is 12 and 15.", "number", "12 and 15", "said"),
        ("The answer is 2 hours and 40 minutes.", "number", "2 hours and 40 minutes", "said"),
        ("<answer>\n$12$\n</answer> That took $3$ steps.", "formula", "12", "said"),
        ("The answer is 3/4, which is 0.75.", "formula", "3/4", "said"),
        ("The answer is (3, 4). That took $2$ steps.", "formula", "(3, 4)", "said"),
        ("The answer is $x = 2$ or $x = 3$, as $x > 0$.", "formula", "x = 2, x = 3", "said"),
        ("The answer is $x+1$ for all $x$.", "formula", "x+1", "said"),
        ("The answer is not 13. It is $12$.", "formula", "12", "formula"),
        ("**Final Answer**\n\n$11,\\! 111$", "formula", "11,\\! 111", "said"),
        ("The answer is:\n\\[\n12\n\\]\nThat took $3$ steps.", "formula", "12", "said"),
        ("#### 1st step\nSo $x = 12$.", "formula", "x = 12", "formula"),
        ("#### Step 2: compare\nThe answer is Evelyn.", "words", "Evelyn", "said"),
        ("She ran for 3 hours.\n#### Evelyn", "words", "Evelyn", "last line"),
        ("It falls on a **Friday**, with $3$ days left.", "words", "Friday", "bold"),
        ("La respuesta es $12$, con $x > 0$.", "formula", "12", "said"),
        ("so $x = 3$ or $y = 4$ hold", "formula", "x = 3, y = 4", "formula"),
        ("Thus $x = 12$, where $x > 0$.", "formula", "x = 12", "formula"),
        (r"so \[ 2x \] it is", "formula", "2x", "formula"),
        ("It is Evelyn", "formula", "It is Evelyn", "last line"),
        ("The answer is Evelyn, who ran for 3 hours.", "words", "Evelyn", "said"),
        ("The answer is $5$.<|im_end|>\nThe answer is $6$.", "formula", "5", "said"),
    ],
)
def test_where_results_stand(answer: str, kind: Kind, found: str, place: str) -> None:
    assert final_answer(answer, kind) == (found, place)


TWELVE = [
    "#### 12",
    "####12 apples",
    "So 12 in all. #### **$12.00**",
    "#### Step 1: add\n5 + 7 = 12\n#### Step 2: check\nThe total is **12**.",
    "#### 1. Add\n5 + 7 = 12\n#### 2. Check\nSo 12.",
    "#### 1 Add\n5 + 7 = 12\n#### 2 Check\nSo 12.",
    "#### Final Answer: 12",
    "### Final Answer\n\n12\n\nWas this of help? 5 stars!",
    "#### 3rd step\nSo 12.",
    "The answer is 12. That took 3 steps.",
    "The answer is $12. She paid with a $20 bill.",
    "The final answer is **12** apples, in 3 boxes.",
    "Answer: 12\n\nLet me check: 3 * 4 = 12, and 12 / 4 = 3.",
    "Answer: She has 16 eggs and sells 4.\nSo 12 are left.",
    "The answer to question 3 is 12. (See step 4.)",
    "The answer, in dollars, should be 12. Paid over 3 days.",
    "The answer is 12 = 3 * 4.",
    "The answer is 12 (3 * 4 = 12).",
    "The answer is 3 * 4 = 12. Done in 1 step.",
    "The answer is not 13. It is 12.",
    "The answer is 12. I checked the answer 3 times: the answer is correct.",
    "The total is **12** apples in 3 boxes.",
    "**Step 1:** 5\n**Step 2:** 7\nTotal: **12**",
    "So it is 12 on the 3rd day.",
    "USD12",
    "R$ 12,00",
    "Rs. 12",
    "12 €",
    "12 %",
    "答案是12。这用了3步。",
    "最终答案是12，用了3天。",
    "所以一共有12个苹果。",
    "答えは12個です。3日かかりました。",
    "정답은 12입니다. 3일 걸렸습니다.",
    "الإجابة هي ١٢. استغرق ذلك ٣ أيام.",
    "उत्तर १२ है। ३ दिन।",
    "คำตอบ: ๑๒",
    "１２",
    "La respuesta es 12. Tardó 3 días.",
    "Die Antwort lautet 12,00. Das dauerte 3 Tage.",
    "Réponse : 12\nen 3 jours",
    "Ответ: 12. Это заняло 3 дня.",
    "Jawabannya adalah 12. Butuh 3 hari.",
    r"\boxed{\text{12 apples}} in 3 boxes",
    r"\boxed{3 \times 4 = 12}",
    "#### 12\n\nQuestion: How many more?\nAnswer: 5\n#### 5",
    "<answer>12</answer> That took 3 steps.",
    r"So it is \boxed{12",
    "At 12:00 PM",
    "12<|im_end|>\n<|im_start|>user\n7",
]
OTHERS = [
    "-12",
    "−12",
    "minus 12",
    "1,2",
    "0.12",
    "12.5",
    "12/5",
    "12 thousand",
    "12k",
    "12th",
    "x12",
    "The answer is 13, not 12.",
]


def numbers(answer: str) -> Fraction | None:
    found = final_answer(answer, "number")
    return None if found is None else Fraction(found.text)


@pytest.mark.parametrize("answer", TWELVE)
def test_twelve(answer: str) -> None:
    assert numbers(answer) == 12


@pytest.mark.parametrize("answer", OTHERS)
def test_other_numbers(answer: str) -> None:
    assert numbers(answer) != 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234", "1234"),
        ("1.234,50 or 1,234.50", "1234.50 1234.50"),
        ("12,50 and 0,125 and 1.234", "12.50 0.125 1.234"),  # no thousands: two digits, a zero before, a full stop
        ("1 234 or 1'234 or 1,00,000", "1234 1234 100000"),
        ("１，２３４ or ١٬٢٣٤ or १,२३४", "1234 1234 1234"),
        ("½, 2½, 2 1/2, 3/4", "1/2 5/2 5/2 3/4"),
        ("70 thousand, 1.5 million, 7万", "70000 1500000 70000"),
        ("5e3, 1,5E-1, 2e2 g, 5em", "5000 3/20 200 5"),
        ("10-3 and -3 and -$3 and $-3", "10 3 -3 -3 -3"),
        ("x2, H2O, 3rd, 1,2,3, 3:30", ""),
        ("step 3: 12", "12"),
        ("step 3", "3"),
    ],
)
def test_numerals(text: str, expected: str) -> None:
    assert [one.text for one in numerals(plain_digits(text))] == expected.split()


@pytest.mark.parametrize(
    "answer", ["Die Antwort ist 1.234.", "La respuesta es 1.234 euros.", "A resposta é R$ 1.234,00."]
)
def test_full_stops_part_thousands_in_some_languages(answer: str) -> None:
    assert numbers(answer) == 1234


def test_no_result() -> None:
    assert final_answer("I do not know.", "number") is None
    assert final_answer(" \n ", "formula") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,234.50", Fraction(2469, 2)),
        (r"\$18", Fraction(18)),
        (r"25\%", Fraction(25)),
        (r"5\text{ inches}", Fraction(5)),
        (r"5 \frac{\text{m}}{\text{s}}", Fraction(5)),
        ("5 cm", Fraction(5)),
        ("1{,}000", Fraction(1000)),
        (r"32,\!348", Fraction(32348)),
        ("-$5", Fraction(-5)),
        ("−5", Fraction(-5)),
        ("0.50", Fraction(1, 2)),
        ("90°", Fraction(90)),
        ("x+1", None),
        ("7x", None),
        ("7 x", None),
        ("2 sqrt", None),
        ("1/2", None),
        ("5 and 6", None),
        ("3,4", None),
        ("9" * 1000, None),
    ],
)
def test_plain_numbers(text: str, expected: Fraction | None) -> None:
    assert plain_number(normalised(text)) == expected


PIECES = r"answer is |answer is \n|$|\(|\boxed{|\boxed{1} or |1,|-|#### |1|\text{| *|-$|1 000 |½|答案|**1** ".split("|")


@pytest.mark.parametrize("piece", [*PIECES, "\n", "<answer>"])
def test_long_answers_take_no_time(piece: str) -> None:
    begin = time.process_time()
    for kind in ("number", "formula", "words"):
        final_answer(piece * 10_000, kind)  # type: ignore[arg-type]
    normalised((piece * 1000)[:1000])
    assert time.process_time() - begin < 10  # a pattern that backtracks needs minutes
