"""The scorers against numbers made by the reference programs, and our own rules against hand-made cases."""

import json
from pathlib import Path

import pytest

import eval as ev

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "eval_vectors.json").read_text())


def caption_scores(case: dict) -> list[float]:
    """CIDEr-D of a vector, whose candidates and references are keyed by image."""
    candidates = [case["hyps"][image][0] for image in case["refs"]]
    return ev.cider_d(candidates, list(case["refs"].values()))


# --- VQA accuracy
@pytest.mark.parametrize("case", VECTORS["vqa_normalise"], ids=lambda case: repr(case["in"]))
def test_vqa_normalise(case):
    assert ev.vqa_normalise(case["in"]) == case["evalai"]


@pytest.mark.parametrize("case", VECTORS["vqa_accuracy"], ids=lambda case: repr(case["pred"]))
def test_vqa_accuracy(case):
    assert ev.vqa_accuracy(case["pred"], case["answers"]) == pytest.approx(case["evalai_fraction"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"),
        ("yalld've", "yalld've"), ("y'alld've", "y'all'd've"), ("twas", "'twas"),
        ("somebody'd", "somebodyd"), ("somebodyd", "somebodyd"), ("Im", "im"), ("shed", "shed"),
        ("hed", "he'd"),
    ],
)  # fmt: skip
def test_contractions_restore_one_apostrophe(text, expected):
    assert ev.vqa_normalise(text) == expected


def test_only_the_first_32_periods_go():
    assert ev.vqa_normalise("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["Red."], 1.0), (["blue"], 0.0), (["red", "red"], 1 / 3), (["red"] * 3, 2 / 3), (["red"] * 4, 1.0),
        (["red", "red", "blue"], (2 / 3 + 2 / 3) / 3),
    ],
)  # fmt: skip
def test_vqa_accuracy_with_few_answers(answers, expected):
    assert ev.vqa_accuracy("red", answers) == pytest.approx(expected)


def test_vqa_accuracy_needs_an_answer():
    with pytest.raises(ZeroDivisionError):
        ev.vqa_accuracy("red", [])


# --- Yes or no
@pytest.mark.parametrize("case", VECTORS["pope_parse"], ids=lambda case: repr(case["text"]))
def test_yesno_parse(case):
    assert ev.yesno_parse(case["text"]) == case["parsed"]


# --- Multiple choice
@pytest.mark.parametrize("case", VECTORS["mmbench_infer"]["cases"], ids=lambda case: repr(case["text"]))
def test_choice_parse_agrees_with_mmbench(case):
    options = list(VECTORS["mmbench_infer"]["choices"].values())
    expected = None if case["text"] == "E" else case["parsed"]  # MMBench takes E, though there are four
    assert ev.choice_parse(case["text"], options) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("b", "B"), (" (c) ", "C"), ("**B**", "B"), ("B: blue", "B"), ("**C. dark green**", "C"),
        ("D)", "D"), ("A.M.", None), ("A, B and D", None), ("A cat", "D"), ("a cat.", "D"), ("A dog", None),
        ("The answer is A", "A"), ("the answer is (A).", "A"), ("The answer is A cat", "D"),
        ("Answer:\nB", "B"), ("The answer is B because red is wrong", "B"),
        ("The answer is A. The answer is B.", None), ("It is DARK  green", "C"), ("greenish", None),
        ("reddish", None), ("", None), ("...", None),
    ],
)  # fmt: skip
def test_choice_parse(text, expected):
    assert ev.choice_parse(text, ["red", "blue", "dark green", "a cat"]) == expected


def test_choice_parse_options():
    assert ev.choice_parse("dark green", ["green", "dark green"]) == "B"
    assert ev.choice_parse("green", ["green", "dark green"]) == "A"
    assert ev.choice_parse("3", ["3", "3"]) is None
    assert ev.choice_parse("$5 (C++)", ["$5", "C#", ""]) == "A"
    assert ev.choice_parse("C", ["yes", "no"]) is None
    assert ev.choice_parse("A", []) is None


# --- Short answers
@pytest.mark.parametrize(
    "text, expected", [("Yes", True), ("yes..", True), ("yes. ", False), (" yes", False), ("y.es", False)]
)
def test_exact_match(text, expected):
    question = ev.Question((), "", ["no", "Yes"])
    assert ev.Task("t", "exact", [question]).score(text, question) == expected


# --- Captions
@pytest.mark.parametrize("case", VECTORS["ptb_tokenize"], ids=lambda case: repr(case["in"]))
def test_ptb_tokenize(case):
    assert ev.ptb_tokenize(case["in"]) == case["tokens"].split()
    if "..." not in case["in"]:  # Java is not stable there either
        assert ev.ptb_tokenize(case["tokens"]) == case["tokens"].split()


@pytest.mark.parametrize(
    "text, expected",
    [  # read off CoreNLP 3.4.1
        ("the dogs' bowl.", "the dogs bowl"), ("she'd've gone", "she 'd 've gone"), ("no. 5", "no. 5"),
        ("a sign that says no.", "a sign that says no"), ("12:30pm", "12:30 pm"), ("one,two", "one two"),
        ("on Main St.", "on main st."), ("two : three", "two three"), ("a - b", "a b"),
        ("vitamin c.", "vitamin c."), ("Mt. Everest", "mt. everest"), ("salt&pepper", "salt & pepper"),
        ("e-mail a@b.com", "e-mail a@b.com"),
    ],
)  # fmt: skip
def test_ptb_tokenize_like_java(text, expected):
    assert ev.ptb_tokenize(text) == expected.split()


@pytest.mark.parametrize(
    "case",
    [VECTORS["cider_d_4images"], *VECTORS["cider_d_pretokenised"]],
    ids=lambda case: case.get("note", "four images"),
)
def test_cider_d(case):
    scores = caption_scores(case)
    assert scores == pytest.approx(case["per_image"], abs=1e-9)
    assert sum(scores) / len(scores) == pytest.approx(case["cider"], abs=1e-9)


def test_cider_d_tokenizes_as_the_reference_does():
    case = VECTORS["cider_d_4images"]
    for image, references in case["refs"].items():
        assert [" ".join(ev.ptb_tokenize(text)) for text in references] == case["refs_tok"][image]
        assert [" ".join(ev.ptb_tokenize(text)) for text in case["hyps"][image]] == case["hyps_tok"][image]


def test_cider_d_rejects_what_it_cannot_score():
    assert ev.cider_d([], []) == []
    for captions, references in ((["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])):
        with pytest.raises((ValueError, ZeroDivisionError)):
            ev.cider_d(captions, references)


# --- Boxes
@pytest.mark.parametrize(
    "text, expected",
    [
        ("10 20 300 999", (10, 20, 300, 999)), ("The dog is at [[10, 20, 300, 400]].", (10, 20, 300, 400)),
        ("(10,20),(300,400) or 5", (10, 20, 300, 400)), ("x1=10, y1=20, x2=30, y2=40", (10, 20, 30, 40)),
        ("10-20-30-40", (10, 20, 30, 40)), ("30 40 10 20", (30, 40, 10, 20)), ("10 20 30", None), ("", None),
        ("10 20 30 1000", None), ("10 20 30 -4", None), ("0.1 0.2 0.3 0.4", None),
        ("9" * 5000 + " 1 2 3", None),
    ],
)  # fmt: skip
def test_parse_box(text, expected):
    assert ev.parse_box(text) == expected


@pytest.mark.parametrize(
    "box, hit",
    [
        ("100 100 400 200", 1), ("200 100 500 200", 1), ("201 100 501 200", 0), ("199 100 499 200", 1),
        ("100 50 400 150", 0), ("100 133 400 233", 1), ("100 134 400 234", 0), ("100 67 400 167", 1),
        ("400 100 700 200", 0), ("400 200 100 100", 0), ("0 0 999 999", 0), ("150 125 350 175", 0),
    ],
)  # fmt: skip
def test_box_hit_counts_the_union_once(box, hit):
    """300 x 100, moved by a third of a side: 200 / 400 is exactly half. Swapped corners have no area."""
    assert ev.box_hit(box, "100 100 400 200") == ev.box_hit("100 100 400 200", box) == hit


def test_box_hit_counts_exactly_half():
    assert ev.box_hit("5 5 5 5", "5 5 5 5") == 0.0
    assert ev.box_hit("0 0 100 50", "0 0 100 100") == 1.0
    assert ev.box_hit("0 0 100 49", "0 0 100 100") == 0.0
    assert ev.box_hit("somewhere on the left", "0 0 100 100") == 0.0
    with pytest.raises(ValueError, match="on the left"):
        ev.box_hit("0 0 100 100", "on the left")


# --- Spread
def test_standard_error():
    assert ev.standard_error([0.0, 100.0]) == pytest.approx(50.0)
    assert ev.standard_error([100.0] * 50 + [0.0] * 50) == pytest.approx(100 * (0.25 / 99) ** 0.5)
    assert ev.standard_error([70.0] * 9) == 0.0
    assert ev.standard_error([70.0]) == ev.standard_error([]) == 0.0
