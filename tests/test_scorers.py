"""The scorers against numbers made by the reference programs, and our own rules against hand-made cases."""

import functools
import itertools
import json
import math
import random
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
    assert ev.vqa_normalise(case["in"], official=True) == case["official"]


@pytest.mark.parametrize("case", VECTORS["vqa_accuracy"], ids=lambda case: repr(case["pred"]))
def test_vqa_accuracy(case):
    assert ev.vqa_accuracy(case["pred"], case["answers"]) == pytest.approx(case["evalai_fraction"])
    official = ev.vqa_accuracy(case["pred"], case["answers"], official=True)
    assert round(100 * official, 2) == case["official_percent"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("Im", "im"),
        ("shed", "shed"),
        ("hed", "he'd"),
    ],
)
def test_contractions_restore_one_apostrophe(text, expected):
    assert ev.vqa_normalise(text, official=True) == expected


def test_only_the_first_32_periods_go():
    assert ev.vqa_normalise("x" + "." * 40) == "x" + "." * 8


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["Red."], 1.0),
        (["blue"], 0.0),
        (["red", "red"], 1 / 3),
        (["red"] * 3, 2 / 3),
        (["red"] * 4, 1.0),
        (["red", "red", "blue"], (2 / 3 + 2 / 3) / 3),
    ],
)
def test_vqa_accuracy_with_few_answers(answers, expected):
    assert ev.vqa_accuracy("red", answers) == pytest.approx(expected)


def test_vqa_accuracy_needs_an_answer():
    with pytest.raises(ValueError, match="at least one answer"):
        ev.vqa_accuracy("red", [])


# --- Yes or no
@pytest.mark.parametrize("case", VECTORS["pope_parse"], ids=lambda case: repr(case["text"]))
def test_yesno_parse(case):
    assert ev.yesno_parse(case["text"]) == case["parsed"]


def test_yesno_metrics():
    case = VECTORS["pope_metrics"]
    metrics = ev.yesno_metrics(case["preds"], case["labels"])
    expected = case["result"]
    assert metrics == pytest.approx(
        {
            "accuracy": expected["accuracy"],
            "precision": expected["precision"],
            "recall": expected["recall"],
            "f1": expected["f1_score"],
            "yes_ratio": expected["yes_ratio"],
        }
    )


def test_yesno_metrics_never_divides_by_zero():
    nothing = dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), 0.0)
    assert ev.yesno_metrics([], []) == nothing
    assert ev.yesno_metrics(["no"], ["Yes"]) == nothing
    assert ev.yesno_metrics(["no"], ["no"]) == nothing | {"accuracy": 1.0}
    assert ev.yesno_metrics(["yes"], ["no"]) == nothing | {"yes_ratio": 1.0}


def test_yesno_metrics_rejects_what_it_cannot_count():
    with pytest.raises(ValueError, match="2 predictions but 1 labels"):
        ev.yesno_metrics(["yes", "no"], ["yes"])
    with pytest.raises(ValueError, match="maybe"):
        ev.yesno_metrics(["yes"], ["maybe"])


@pytest.mark.parametrize("case", VECTORS["mme_parse"], ids=lambda case: repr(case["text"]))
def test_mme_parse(case):
    assert ev.mme_parse(case["text"]) == case["parsed"]


@pytest.mark.parametrize(
    "text, expected", [("yea", "other"), ("noyes", "no"), ("yeno", "no"), ("n.o.", "no"), ("no yes", "no")]
)
def test_mme_parse_reads_four_characters(text, expected):
    assert ev.mme_parse(text) == expected


def test_mme_score():
    case = VECTORS["mme_score"]
    scores = ev.mme_score(case["rows"])
    assert (scores["perception"], scores["cognition"]) == (case["perception"], case["cognition"])
    assert scores["color"] == {"acc": 75.0, "acc_plus": 50.0, "score": 125.0}
    assert scores["count"] == {"acc": 0.0, "acc_plus": 0.0, "score": 0.0}
    assert scores["OCR"]["score"] == 200.0
    assert scores["code_reasoning"] == {"acc": 50.0, "acc_plus": 0.0, "score": 50.0}
    assert set(scores) == {"color", "count", "OCR", "code_reasoning", "perception", "cognition"}


def test_mme_score_of_everything_right():
    rows = [
        {"category": category, "question_id": image, "gt": gt, "pred": gt}
        for categories in ev.MME_CATEGORIES.values()
        for category in categories
        for image in ("a", "b", "c")
        for gt in ("Yes", "No")
    ]
    scores = ev.mme_score(rows)
    assert (scores["perception"], scores["cognition"], len(scores)) == (2000.0, 800.0, 16)
    assert ev.mme_score([]) == {"perception": 0, "cognition": 0}


def test_mme_score_rejects_what_it_cannot_count():
    row = {"category": "color", "question_id": "7", "gt": "Yes", "pred": "Yes"}
    with pytest.raises(ValueError, match="color 7 has 1"):
        ev.mme_score([row])
    with pytest.raises(ValueError, match="colour"):
        ev.mme_score([row, row | {"category": "colour"}])
    with pytest.raises(ValueError, match="maybe"):
        ev.mme_score([row, row | {"gt": "maybe"}])


# --- Multiple choice
@pytest.mark.parametrize("case", VECTORS["mmbench_infer"]["cases"], ids=lambda case: repr(case["text"]))
def test_choice_parse_agrees_with_mmbench(case):
    options = list(VECTORS["mmbench_infer"]["choices"].values())
    expected = None if case["text"] == "E" else case["parsed"]  # MMBench takes E, though there are four
    assert ev.choice_parse(case["text"], options) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("b", "B"),
        (" (c) ", "C"),
        ("**B**", "B"),
        ("B: blue", "B"),
        ("**C. dark green**", "C"),
        ("D)", "D"),
        ("A.M.", None),
        ("A, B and D", None),
        ("A cat", "D"),
        ("a cat.", "D"),
        ("A dog", None),
        ("The answer is A", "A"),
        ("the answer is (A).", "A"),
        ("The answer is A cat", "D"),
        ("Answer:\nB", "B"),
        ("The answer is B because red is wrong", "B"),
        ("The answer is A. The answer is B.", None),
        ("It is DARK  green", "C"),
        ("greenish", None),
        ("reddish", None),
        ("", None),
        ("...", None),
    ],
)
def test_choice_parse(text, expected):
    assert ev.choice_parse(text, ["red", "blue", "dark green", "a cat"]) == expected


def test_choice_parse_options():
    assert ev.choice_parse("dark green", ["green", "dark green"]) == "B"
    assert ev.choice_parse("green", ["green", "dark green"]) == "A"
    assert ev.choice_parse("3", ["3", "3"]) is None
    assert ev.choice_parse("$5 (C++)", ["$5", "C#", ""]) == "A"
    assert ev.choice_parse("C", ["yes", "no"]) is None
    assert ev.choice_parse("A", []) is None


@pytest.mark.parametrize("case", VECTORS["scienceqa_parse"], ids=lambda case: repr(case["text"]))
def test_scienceqa_parse(case):
    letter = ev.scienceqa_parse(case["text"], 5)
    assert letter == (None if case["llava"] == "FAILED" else case["llava"])
    shorter = letter if letter in ("A", "B") else None
    assert ev.scienceqa_parse(case["text"], 2) == shorter


def test_scienceqa_parse_needs_a_letter_among_five():
    assert ev.scienceqa_parse("The answer is F.", 6) is None
    assert ev.scienceqa_parse("A.\n", 5) is None
    assert ev.scienceqa_parse("A\n", 5) is None
    assert ev.scienceqa_parse("The answer is Apple", 5) == "A"
    assert ev.scienceqa_parse("B. The answer is A.", 5) == "B"


@pytest.mark.parametrize("case", VECTORS["mmbench_infer"]["cases"], ids=lambda case: repr(case["text"]))
def test_mmbench_parse(case):
    assert (
        ev.mmbench_parse(case["text"], list(VECTORS["mmbench_infer"]["choices"].values())) == case["parsed"]
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A dog is", "A"),
        ("A dog is here", None),
        ("A. dog is here", "A"),
        ("A dog and B", None),
        ("A dog and B.", "B"),
        ("A. or (B)", "A"),
        ("E red", "E"),
        ("covered", "A"),
        ("it is DARK GREEN", "C"),
        ("it is dark  green", None),
    ],
)
def test_mmbench_parse_in_order(text, expected):
    assert ev.mmbench_parse(text, ["red", "blue", "dark green", "a cat"]) == expected


def test_mmbench_circular():
    case = VECTORS["mmbench_circular"]
    groups = [[gt == said for gt, said in record["gt_pred_per_rotation"]] for record in case["records"]]
    assert ev.mmbench_circular(groups) == case["circular_acc"]
    assert ev.mmbench_circular([group[:1] for group in groups]) == case["vanilla_acc_first_rotation"]
    assert ev.mmbench_circular([]) == 0.0


@pytest.mark.parametrize("case", VECTORS["mmmu_mcq_parse"]["cases"], ids=lambda case: repr(case["text"]))
def test_mmmu_parse(case):
    letter = ev.mmmu_parse(case["text"], VECTORS["mmmu_mcq_parse"]["options"])
    assert letter == (None if case["parsed"] == "RANDOM" else case["parsed"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("DNA helix", "A"),
        ("C.D. or so", "C"),  # two candidates that " C " and " D " do not place
        ("(B) is wrong, (A) too, not D ", "A"),
        ("I would say blue, not red, I believe", "A"),
        ("it is blue in my view", "B"),
        ("it is blue, not red", None),
        ("B or DNA", "B"),
        ("B'.", "B"),
        ("':B:'", None),  # the colon's turn has passed when the apostrophes go
        ("", None),
    ],
)
def test_mmmu_parse_in_order(text, expected):
    assert ev.mmmu_parse(text, ["red", "blue", "dark green", "a cat"]) == expected
    assert ev.mmmu_parse(text, []) is None


@pytest.mark.parametrize("case", VECTORS["mmmu_open"], ids=lambda case: repr(case["text"]))
def test_mmmu_open(case):
    assert sorted(map(str, ev.mmmu_values(case["text"]))) == case["parsed"]
    assert ev.mmmu_open(case["text"], [case["gold"]]) == case["correct_official"]
    assert ev.mmmu_open(case["text"], ["never", case["gold"]]) == case["correct_official"]


@pytest.mark.parametrize(
    "text, values",
    [
        ("The sum is = 3", [3.0]),
        ("x = 3\nso yes", ["yes"]),  # "=" is a cue in the last line only
        ("it is :\nresult 4 m", [4.0, "4 m"]),
        ("this one", ["one"]),
        ("is so ", ["so"]),
        ("12,345 is .5", [0.5]),
        ("-2,500,000", [-2500000.0, 0.0]),  # the last three digits are also a number of their own
    ],
)
def test_mmmu_values(text, values):
    assert ev.mmmu_values(text) == sorted(values, key=str)


def test_mmmu_open_compares_like_with_like():
    assert ev.mmmu_open("unknown", ["no"])
    assert not ev.mmmu_open("12 cats", ["2"])  # a number is not looked for inside a text
    assert ev.mmmu_open("12 cats", ["12.001"])
    assert not ev.mmmu_open("banana", ["a"])
    assert ev.mmmu_open("plan a", ["A"])
    assert not ev.mmmu_open("yes", [])


@pytest.mark.parametrize("case", VECTORS["mcq_extract_ABCD"], ids=lambda case: repr(case["text"]))
def test_mmstar_parse(case):
    assert ev.mmstar_parse(case["text"]) == (case["parsed"] or None)


@pytest.mark.parametrize(
    "text, expected",
    [  # each beats the format below it
        ("A is not D", "A"),
        ("the answer is A, plan D", "D"),
        ("(B) my choice is C (not B)", "B"),
        ("the answer is B. A cat", "A"),
        ("the answer is A, not B, but A indeed", "B"),
        ("answer is A or B; the answer is A or so", "A"),
        ("option (B) not C. ever", "B"),
        ("it is B. not C: ever", "B"),
        ("it is B: not C) ever", "B"),
        ("it is B) not C ever", "B"),
        ("xB yCz", "B"),
        ("xDy", "D"),
        ("xCyDz", "D"),
        ("E", None),
        ("...", None),
    ],
)
def test_mmstar_parse_ranks_formats(text, expected):
    assert ev.mmstar_parse(text) == expected


def test_mmstar_parse_knows_only_its_letters():
    assert ev.mmstar_parse("(E) not D)", "ABCDE") == "E"
    assert ev.mmstar_parse("(E) not D)") == "D"
    assert ev.mmstar_parse("A", "") is None


# --- Short answers
@pytest.mark.parametrize(
    "text, expected", [("Yes", True), ("yes..", True), ("yes. ", False), (" yes", False), ("y.es", False)]
)
def test_gqa_match(text, expected):
    assert ev.gqa_match(text, "yes") == expected


@functools.cache
def naive_distance(a: str, b: str) -> int:
    """Levenshtein's own recursion."""
    if not a or not b:
        return len(a) + len(b)
    replaced = naive_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, naive_distance(a[1:], b) + 1, naive_distance(a, b[1:]) + 1)


def test_edit_distance_is_that_of_the_definition():
    words = ["".join(word) for n in range(5) for word in itertools.product("ab", repeat=n)]
    words += ["kitten", "sitting", "saturday", "sunday"]
    for a, b in itertools.product(words, words):
        assert ev.edit_distance(a, b) == naive_distance(a, b)
    assert ev.edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize("case", VECTORS["anls"], ids=lambda case: repr(case["pred"]))
def test_anls(case):
    assert ev.anls(case["pred"], case["answers"]) == case["anls_rrc"]
    assert ev.anls(case["pred"], case["answers"], strict=True) == case["anls_paper_strict"]
    assert ev.anls(case["pred"], ["unlike this", *case["answers"]]) == case["anls_rrc"]


def test_anls_of_spaces_and_of_nothing():
    assert ev.anls("", [""]) == 1.0
    assert ev.anls("a  b", ["a c"]) == 0.75  # one edit over four characters, of which one is a second space
    with pytest.raises(ValueError, match="at least one answer"):
        ev.anls("a", [])


@pytest.mark.parametrize(
    "case", VECTORS["chartqa_relaxed"], ids=lambda case: f"{case['pred']!r} for {case['target']!r}"
)
def test_relaxed_match(case):
    assert ev.relaxed_match(case["pred"], case["target"]) == case["correct"]


# --- Captions
@pytest.mark.parametrize("case", VECTORS["ptb_tokenize"], ids=lambda case: repr(case["in"]))
def test_ptb_tokenize(case):
    assert ev.ptb_tokenize(case["in"]) == case["tokens"].split()
    if "..." not in case["in"]:  # Java is not stable there either
        assert ev.ptb_tokenize(case["tokens"]) == case["tokens"].split()


@pytest.mark.parametrize(
    "text, expected",
    [  # read off CoreNLP 3.4.1
        ("the dogs' bowl.", "the dogs bowl"),
        ("she'd've gone", "she 'd 've gone"),
        ("no. 5", "no. 5"),
        ("a sign that says no.", "a sign that says no"),
        ("12:30pm", "12:30 pm"),
        ("on Main St.", "on main st."),
        ("one,two", "one two"),
        ("two : three", "two three"),
        ("a - b", "a b"),
        ("vitamin c.", "vitamin c."),
        ("Mt. Everest", "mt. everest"),
        ("salt&pepper", "salt & pepper"),
        ("e-mail a@b.com", "e-mail a@b.com"),
    ],
)
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
    with pytest.raises(ValueError, match="1 candidate captions but 2"):
        ev.cider_d(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="item 1 has no references"):
        ev.cider_d(["a", "b"], [["a"], []])


def naive_bleu4(candidates: list[str], references: list[list[str]]) -> float:
    """BLEU-4 of captions of plain words, by lists and without the two small constants."""
    log_precision, length, reference_length = 0.0, 0, 0
    for n in range(1, 5):
        hits = tries = 0
        for candidate, group in zip(candidates, references):
            ours, *theirs = (
                [words[i : i + n] for i in range(len(words) - n + 1)]
                for words in (text.split() for text in (candidate, *group))
            )
            tries += len(ours)
            for i, gram in enumerate(ours):  # the k-th occurrence counts if a reference has k
                hits += any(grams.count(gram) > ours[:i].count(gram) for grams in theirs)
        log_precision += math.log(hits / tries) / 4
    for candidate, group in zip(candidates, references):
        length += len(candidate.split())
        gaps = [(abs(len(text.split()) - len(candidate.split())), len(text.split())) for text in group]
        reference_length += min(gaps)[1]
    return math.exp(log_precision + min(0, 1 - reference_length / length))


def test_bleu4_by_hand():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples; as long as the reference
    assert ev.bleu4(["a b c d x"], [["a b c d e"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # all hit, but 4 words against 6: the nearer reference, and the shorter where two are as near
    assert ev.bleu4(["a b c d"], [["a b c d e f", "q " * 9]]) == pytest.approx(math.exp(1 - 6 / 4))
    assert ev.bleu4(["a b c d e f"], [["a b c d e f g h", "q q q q"]]) == pytest.approx(1.0)
    # "the" is hit twice, as often as in one reference, though three times over both
    assert ev.bleu4(["the the the cat"], [["the the dog", "the cat"]]) < 1e-3
    assert ev.bleu4(["The cat, it sat!"], [["the cat it sat"]]) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_bleu4_is_that_of_the_definition(seed):
    draw = random.Random(seed)
    words = "big red dog cat runs over grass".split()
    references = [
        [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(draw.randint(1, 4))]
        for _ in range(8)
    ]
    candidates = [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in references]
    candidates[:2] = [group[0] for group in references[:2]]  # some 4-grams must hit
    assert ev.bleu4(candidates, references) == pytest.approx(naive_bleu4(candidates, references), rel=1e-6)


def test_bleu4_like_coco_caption():
    made_by_pycocoevalcap = [
        0.6966517369684264,
        0.9999999992291674,
        0.9999999997395838,
        0.8948393165388163,
        0.9999999997395838,
        0.5233175695597724,
        0.03162277658916645,
        0.9999999997395838,
        6.939843268483755e-13,
        4.400558682041724e-06,
    ]
    cases = [VECTORS["cider_d_4images"], *VECTORS["cider_d_pretokenised"]]
    ours = [
        ev.bleu4([case["hyps"][image][0] for image in case["refs"]], list(case["refs"].values()))
        for case in cases
    ]
    assert ours == pytest.approx(made_by_pycocoevalcap, rel=1e-9, abs=0)


def test_bleu4_rejects_what_it_cannot_score():
    assert ev.bleu4([], []) == ev.bleu4([""], [["a b"]]) == 0.0
    with pytest.raises(ValueError, match="1 candidate captions but 2"):
        ev.bleu4(["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="item 1 has no references"):
        ev.bleu4(["a", "b"], [["a"], []])


# --- Boxes
@pytest.mark.parametrize(
    "text, expected",
    [
        ("10 20 300 999", (10, 20, 300, 999)),
        ("The dog is at [[10, 20, 300, 400]].", (10, 20, 300, 400)),
        ("(10,20),(300,400) or 5", (10, 20, 300, 400)),
        ("x1=10, y1=20, x2=30, y2=40", (10, 20, 30, 40)),
        ("10-20-30-40", (10, 20, 30, 40)),
        ("30 40 10 20", (30, 40, 10, 20)),
        ("10 20 30", None),
        ("", None),
        ("10 20 30 1000", None),
        ("10 20 30 -4", None),
        ("0.1 0.2 0.3 0.4", None),
        ("9" * 5000 + " 1 2 3", None),
    ],
)
def test_parse_box(text, expected):
    assert ev.parse_box(text) == expected


def test_box_iou():
    square = (100, 100, 300, 300)
    assert ev.box_iou(square, square) == 1.0
    assert ev.box_iou(square, (200, 100, 400, 300)) == pytest.approx(1 / 3)
    assert ev.box_iou(square, (300, 100, 500, 300)) == 0.0  # they touch
    assert ev.box_iou(square, (300, 300, 100, 100)) == 0.0  # swapped corners have no area
    assert ev.box_iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0


def test_box_hit_counts_exactly_half():
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
