"""The scorers against numbers made by the reference programs, and our own rules against hand-made cases."""

import functools
import itertools
import json
import math
import random
from pathlib import Path

import pytest

from tools import benchmarks

VECTORS = json.loads((Path(__file__).parent.parent / "fixtures" / "eval_vectors.json").read_text())


def test_yesno_metrics():
    case = VECTORS["pope_metrics"]
    metrics, expected = benchmarks.yesno_metrics(case["preds"], case["labels"]), case["result"]
    assert metrics.keys() == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    for name, value in metrics.items():
        assert value == pytest.approx(expected["f1_score" if name == "f1" else name])


def test_yesno_metrics_never_divides_by_zero():
    nothing = dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), 0.0)
    assert benchmarks.yesno_metrics([], []) == nothing
    assert benchmarks.yesno_metrics(["no"], ["Yes"]) == nothing
    assert benchmarks.yesno_metrics(["no"], ["no"]) == nothing | {"accuracy": 1.0}
    assert benchmarks.yesno_metrics(["yes"], ["no"]) == nothing | {"yes_ratio": 1.0}


def test_yesno_metrics_rejects_what_it_cannot_count():
    with pytest.raises(ValueError, match="2 predictions but 1 labels"):
        benchmarks.yesno_metrics(["yes", "no"], ["yes"])
    with pytest.raises(ValueError, match="maybe"):
        benchmarks.yesno_metrics(["yes"], ["maybe"])


@pytest.mark.parametrize("case", VECTORS["mme_parse"], ids=lambda case: repr(case["text"]))
def test_mme_parse(case):
    assert benchmarks.mme_parse(case["text"]) == case["parsed"]


@pytest.mark.parametrize(
    "text, expected", [("yea", "other"), ("noyes", "no"), ("yeno", "no"), ("n.o.", "no"), ("no yes", "no")]
)
def test_mme_parse_reads_four_characters(text, expected):
    assert benchmarks.mme_parse(text) == expected


def test_mme_score():
    case = VECTORS["mme_score"]
    scores = benchmarks.mme_score(case["rows"])
    assert (scores["perception"], scores["cognition"]) == (case["perception"], case["cognition"])
    assert scores["color"] == {"acc": 75.0, "acc_plus": 50.0, "score": 125.0}
    assert scores["count"] == {"acc": 0.0, "acc_plus": 0.0, "score": 0.0}
    assert scores["OCR"]["score"] == 200.0
    assert scores["code_reasoning"] == {"acc": 50.0, "acc_plus": 0.0, "score": 50.0}
    assert set(scores) == {"color", "count", "OCR", "code_reasoning", "perception", "cognition"}


def test_mme_score_of_everything_right():
    rows, categories = [], sum(benchmarks.MME_CATEGORIES.values(), [])
    for category, image, answer in itertools.product(categories, "abc", ("Yes", "No")):
        rows.append({"category": category, "question_id": image, "gt": answer, "pred": answer})
    scores = benchmarks.mme_score(rows)
    assert (scores["perception"], scores["cognition"], len(scores)) == (2000.0, 800.0, 16)
    assert benchmarks.mme_score([]) == {"perception": 0, "cognition": 0}


def test_mme_score_rejects_what_it_cannot_count():
    row = {"category": "color", "question_id": "7", "gt": "Yes", "pred": "Yes"}
    with pytest.raises(ValueError, match="color 7 has 1"):
        benchmarks.mme_score([row])
    with pytest.raises(ValueError, match="colour"):
        benchmarks.mme_score([row, row | {"category": "colour"}])
    with pytest.raises(ValueError, match="maybe"):
        benchmarks.mme_score([row, row | {"gt": "maybe"}])


@pytest.mark.parametrize("case", VECTORS["scienceqa_parse"], ids=lambda case: repr(case["text"]))
def test_scienceqa_parse(case):
    letter = benchmarks.scienceqa_parse(case["text"], 5)
    assert letter == (None if case["llava"] == "FAILED" else case["llava"])
    shorter = letter if letter in ("A", "B") else None
    assert benchmarks.scienceqa_parse(case["text"], 2) == shorter


def test_scienceqa_parse_needs_a_letter_among_five():
    assert benchmarks.scienceqa_parse("The answer is F.", 6) is None
    assert benchmarks.scienceqa_parse("A.\n", 5) is None
    assert benchmarks.scienceqa_parse("A\n", 5) is None
    assert benchmarks.scienceqa_parse("The answer is Apple", 5) == "A"
    assert benchmarks.scienceqa_parse("B. The answer is A.", 5) == "B"


@pytest.mark.parametrize("case", VECTORS["mmbench_infer"]["cases"], ids=lambda case: repr(case["text"]))
def test_mmbench_parse(case):
    options = list(VECTORS["mmbench_infer"]["choices"].values())
    assert benchmarks.mmbench_parse(case["text"], options) == case["parsed"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A dog is", "A"), ("A dog is here", None), ("A. dog is here", "A"), ("A dog and B", None),
        ("A dog and B.", "B"), ("A. or (B)", "A"), ("E red", "E"), ("covered", "A"),
        ("it is DARK GREEN", "C"), ("it is dark  green", None),
    ],
)  # fmt: skip
def test_mmbench_parse_in_order(text, expected):
    assert benchmarks.mmbench_parse(text, ["red", "blue", "dark green", "a cat"]) == expected


def test_mmbench_circular():
    case = VECTORS["mmbench_circular"]
    groups = [[gt == said for gt, said in record["gt_pred_per_rotation"]] for record in case["records"]]
    assert benchmarks.mmbench_circular(groups) == case["circular_acc"]
    assert benchmarks.mmbench_circular([group[:1] for group in groups]) == case["vanilla_acc_first_rotation"]
    assert benchmarks.mmbench_circular([]) == 0.0


@pytest.mark.parametrize("case", VECTORS["mmmu_mcq_parse"]["cases"], ids=lambda case: repr(case["text"]))
def test_mmmu_parse(case):
    letter = benchmarks.mmmu_parse(case["text"], VECTORS["mmmu_mcq_parse"]["options"])
    assert letter == (None if case["parsed"] == "RANDOM" else case["parsed"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("DNA helix", "A"), ("(B) is wrong, (A) too, not D ", "A"), ("it is blue in my view", "B"),
        ("", None), ("I would say blue, not red, I believe", "A"), ("it is blue, not red", None),
        ("B or DNA", "B"), ("C.D. or so", "C"),  # two candidates that " C " and " D " do not place
        ("B'.", "B"), ("':B:'", None),  # the colon's turn has passed when the apostrophes go
    ],
)  # fmt: skip
def test_mmmu_parse_in_order(text, expected):
    assert benchmarks.mmmu_parse(text, ["red", "blue", "dark green", "a cat"]) == expected
    assert benchmarks.mmmu_parse(text, []) is None


@pytest.mark.parametrize("case", VECTORS["mmmu_open"], ids=lambda case: repr(case["text"]))
def test_mmmu_open(case):
    assert sorted(map(str, benchmarks.mmmu_values(case["text"]))) == case["parsed"]
    assert benchmarks.mmmu_open(case["text"], [case["gold"]]) == case["correct_official"]
    assert benchmarks.mmmu_open(case["text"], ["never", case["gold"]]) == case["correct_official"]


@pytest.mark.parametrize(
    "text, values",
    [
        ("The sum is = 3", [3.0]), ("x = 3\nso yes", ["yes"]),  # "=" is a cue in the last line only
        ("it is :\nresult 4 m", [4.0, "4 m"]), ("this one", ["one"]), ("is so ", ["so"]),
        ("12,345 is .5", [0.5]), ("-2,500,000", [-2500000.0, 0.0]),  # digits that count twice
    ],
)  # fmt: skip
def test_mmmu_values(text, values):
    assert benchmarks.mmmu_values(text) == sorted(values, key=str)


def test_mmmu_open_compares_like_with_like():
    assert benchmarks.mmmu_open("unknown", ["no"])
    assert not benchmarks.mmmu_open("12 cats", ["2"])  # a number is not looked for inside a text
    assert benchmarks.mmmu_open("12 cats", ["12.001"])
    assert not benchmarks.mmmu_open("banana", ["a"])
    assert benchmarks.mmmu_open("plan a", ["A"])
    assert not benchmarks.mmmu_open("yes", [])


@pytest.mark.parametrize("case", VECTORS["mcq_extract_ABCD"], ids=lambda case: repr(case["text"]))
def test_mmstar_parse(case):
    assert benchmarks.mmstar_parse(case["text"]) == (case["parsed"] or None)


@pytest.mark.parametrize(
    "text, expected",
    [  # each beats the format below it
        ("A is not D", "A"), ("the answer is A, plan D", "D"), ("(B) my choice is C (not B)", "B"),
        ("the answer is B. A cat", "A"), ("the answer is A, not B, but A indeed", "B"),
        ("answer is A or B; the answer is A or so", "A"), ("option (B) not C. ever", "B"),
        ("it is B. not C: ever", "B"), ("it is B: not C) ever", "B"), ("it is B) not C ever", "B"),
        ("xB yCz", "B"), ("xDy", "D"), ("xCyDz", "D"), ("E", None), ("...", None),
    ],
)  # fmt: skip
def test_mmstar_parse_ranks_formats(text, expected):
    assert benchmarks.mmstar_parse(text) == expected


def test_mmstar_parse_knows_only_its_letters():
    assert benchmarks.mmstar_parse("(E) not D)", "ABCDE") == "E"
    assert benchmarks.mmstar_parse("(E) not D)") == "D"
    assert benchmarks.mmstar_parse("A", "") is None


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
        assert benchmarks.edit_distance(a, b) == naive_distance(a, b)
    assert benchmarks.edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize("case", VECTORS["anls"], ids=lambda case: repr(case["pred"]))
def test_anls(case):
    assert benchmarks.anls(case["pred"], case["answers"]) == case["anls_rrc"]
    assert benchmarks.anls(case["pred"], case["answers"], strict=True) == case["anls_paper_strict"]
    assert benchmarks.anls(case["pred"], ["unlike this", *case["answers"]]) == case["anls_rrc"]


def test_anls_of_spaces_and_of_nothing():
    assert benchmarks.anls("", [""]) == 1.0
    assert benchmarks.anls("a  b", ["a c"]) == 0.75  # one edit over four characters: two are spaces
    with pytest.raises(ValueError, match="at least one answer"):
        benchmarks.anls("a", [])


@pytest.mark.parametrize(
    "case", VECTORS["chartqa_relaxed"], ids=lambda case: f"{case['pred']!r} for {case['target']!r}"
)
def test_relaxed_match(case):
    assert benchmarks.relaxed_match(case["pred"], case["target"]) == case["correct"]


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
    right = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert benchmarks.bleu4(["a b c d x"], [["a b c d e"]]) == pytest.approx(right)
    # all hit, but 4 words against 6: the nearer reference, and the shorter where two are as near
    assert benchmarks.bleu4(["a b c d"], [["a b c d e f", "q " * 9]]) == pytest.approx(math.exp(1 - 6 / 4))
    assert benchmarks.bleu4(["a b c d e f"], [["a b c d e f g h", "q q q q"]]) == pytest.approx(1.0)
    # "the" is hit twice, as often as in one reference, though three times over both
    assert benchmarks.bleu4(["the the the cat"], [["the the dog", "the cat"]]) < 1e-3
    assert benchmarks.bleu4(["The cat, it sat!"], [["the cat it sat"]]) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_bleu4_is_that_of_the_definition(seed):
    draw = random.Random(seed)
    words = "big red dog cat runs over grass".split()

    def captions(n: int) -> list[str]:
        return [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(n)]

    references, candidates = [captions(draw.randint(1, 4)) for _ in range(8)], captions(8)
    candidates[:2] = [group[0] for group in references[:2]]  # some 4-grams must hit
    naive = naive_bleu4(candidates, references)
    assert benchmarks.bleu4(candidates, references) == pytest.approx(naive, rel=1e-6)


def test_bleu4_like_coco_caption():
    made_by_pycocoevalcap = [
        0.6966517369684264, 0.9999999992291674, 0.9999999997395838, 0.8948393165388163, 0.9999999997395838,
        0.5233175695597724, 0.03162277658916645, 0.9999999997395838, 6.939843268483755e-13,
        4.400558682041724e-06,
    ]  # fmt: skip
    scores = []
    for case in (VECTORS["cider_d_4images"], *VECTORS["cider_d_pretokenised"]):
        candidates = [case["hyps"][image][0] for image in case["refs"]]
        scores.append(benchmarks.bleu4(candidates, list(case["refs"].values())))
    assert scores == pytest.approx(made_by_pycocoevalcap, rel=1e-9, abs=0)


def test_bleu4_rejects_what_it_cannot_score():
    assert benchmarks.bleu4([], []) == benchmarks.bleu4([""], [["a b"]]) == 0.0
    for captions, references in ((["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])):
        with pytest.raises(ValueError):
            benchmarks.bleu4(captions, references)
