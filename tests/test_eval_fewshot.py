"""Few-shot evaluation: templates, demonstrations, stops, likelihoods, loss on text, documents of Scenes."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_eval import TOKENIZER, prompt_text, save_tiny_run, tiny_vlm
from helpers_tokenizers import small_tokenizer
from PIL import Image

import data
import eval as evaluation
import model
from model import UserError
from tools import check

OTHERS = [small_tokenizer(kind) for kind in ("gpt2", "smollm2", "qwen", "llama3")]


def token_ids(pieces: list) -> list[int]:
    return [i for piece in pieces if not isinstance(piece, int) for i in piece[0]]


# --- templates and their tokens


def test_prompts_are_mm1s_templates_to_the_letter():
    demos = [data.Example(None, "what colour is it?", "dax"), data.Example(None, "", "north red ring.")]
    expected = (
        "[0] Question: what colour is it? Short answer: dax\n[1] A photo of north red ring.\n"
        "[2] Question: and now? Short answer:"
    )
    assert prompt_text(data.shot_pieces(demos, "and now?", TOKENIZER)) == expected
    assert prompt_text(data.shot_pieces([], "", TOKENIZER)) == "[0] A photo of"  # truly 0-shot
    gpt2 = data.shot_pieces(demos, "and now?", OTHERS[0])
    assert prompt_text(gpt2, OTHERS[0]) == expected.replace("] ", "]")
    assert data.shot_pieces([], "", TOKENIZER)[0] == (TOKENIZER.start, False)
    task = evaluation.scenes_task("scenes_cap", 2, 0, 1)
    text = prompt_text(task.prompt(task.questions[0], TOKENIZER))
    assert re.fullmatch(r"\[0\] A photo of [a-z].*\.\n\[1\] A photo of", text)
    chat = evaluation.scenes_task("scenes_cap", 2, 0, None)
    assert data.CAPTION_PROMPT in prompt_text(chat.prompt(chat.questions[0], TOKENIZER))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, *OTHERS], ids="scenes gpt2 smollm2 qwen llama3".split())
def test_training_documents_and_prompts_have_the_same_tokens_at_their_borders(tokenizer):
    """Prompt, answer and newline are the document, token for token: no prompt breaks off inside one."""
    for i in range(60):
        record = data.Scenes("interleaved")[i]
        document = token_ids(data.pieces_of(record, tokenizer))[:-1]  # without the end token
        demos = []
        for text in record.parts[1::2]:
            question, answer = re.fullmatch(
                "(?:Question: (.*) Short answer:|A photo of) (.*)\n", text
            ).groups()
            demos.append(data.Example(None, question or "", answer))
        last = demos.pop()
        prompt = data.shot_pieces(demos, last.question, tokenizer)
        space = "" if tokenizer.prefix else " "
        assert token_ids(prompt) + tokenizer.encode(space + last.answer + "\n") == document
        assert not any(piece[1] for piece in prompt if not isinstance(piece, int))  # nothing is supervised


# --- demonstrations


@pytest.mark.parametrize("name", [*evaluation.SCENE_TASKS, "scenes_bind"])
def test_demonstrations_are_drawn_per_question_from_the_train_split(name):
    task, again = (evaluation.scenes_task(name, 12, 0, 4) for _ in range(2))
    none, other = evaluation.scenes_task(name, 12, 0, 0), evaluation.scenes_task(name, 12, 1, 4)
    names = [[tuple(demo.name for demo in q.demos) for q in t.questions] for t in (task, again, other)]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == len(names[0]) and all(len(set(ids)) == 4 for ids in names[0])
    bare = [(q.images, q.text, q.answers) for q in none.questions]
    assert bare == [(q.images, q.text, q.answers) for q in task.questions]
    pictures = {demo.image for q in task.questions for demo in q.demos}
    assert not pictures & {q.images[0] for q in task.questions}
    pairs = {(thing.colour, thing.shape) for picture in pictures for thing in picture.things}
    assert pairs and not pairs & data.HELD_OUT
    if name == "scenes_bind":
        for demo in task.questions[0].demos:
            assert data.make_scene("train", int(demo.name)) == demo.image


def write_files(folder, n: int = 6) -> None:
    for split, first in (("train", 0), ("test", n)):
        rows = []
        for i in range(first, first + n):
            Image.new("RGB", (32, 32), (40 * i % 256, 90, 10)).save(folder / f"{i}.png")
            row = {"question_id": f"q{i}", "image": f"{i}.png", "text": "what shade?"}
            rows.append({**row, "answers": ["red", "blue"][i % 2 :]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder, **flags) -> evaluation.EvalConfig:
    return evaluation.EvalConfig(model="none", tasks=f"vqa:{folder}/test.jsonl", n=4, **flags)


def test_file_tasks_take_demonstrations_from_demos_and_refuse_the_test_split(tmp_path):
    write_files(tmp_path)
    cfg = config(tmp_path, shots="0,2", demos=str(tmp_path / "train.jsonl"))
    zero, two = evaluation.open_tasks(cfg, evaluation.open_task)
    assert (zero.shots, two.shots) == (0, 2) and not any(q.demos for q in zero.questions)
    assert {d.name for q in two.questions for d in q.demos} <= {f"q{i}" for i in range(6)}
    text = prompt_text(two.prompt(two.questions[0], TOKENIZER))
    one = r"\[\d\] Question: what shade\? Short answer: (red|blue)\n"
    assert re.fullmatch(one * 2 + r"\[2\] Question: what shade\? Short answer:", text)
    for flags, words in [
        ({"shots": "2", "demos": str(tmp_path / "test.jsonl")}, "not of the train split"),
        ({"shots": "2"}, "has only 0 demonstrations"),
        ({"shots": "9", "demos": str(tmp_path / "train.jsonl")}, "has only 6 demonstrations"),
        ({"shots": "-1"}, "--shots '-1'"),
        ({"shots": "four"}, "--shots 'four'"),
    ]:
        with pytest.raises(UserError, match=words):
            evaluation.open_tasks(config(tmp_path, **flags), evaluation.open_task)
    with pytest.raises(UserError, match="--scoring 'best' is unknown"):
        evaluation.main(["--model", "none", "--scoring", "best"])
    task, cfg = evaluation.open_task(f"vqa:{tmp_path}/test.jsonl", None, config(tmp_path)), config(tmp_path)
    cfg.scoring = "likelihood"
    with pytest.raises(UserError, match="possible answers of test are not known"):
        evaluation.answer_all(tiny_vlm(), TOKENIZER, task, [q.images for q in task.questions], "full", cfg)


def test_scenes_has_the_tasks_of_always_and_words():
    def opened(**flags) -> list[tuple]:
        tasks = evaluation.open_tasks(evaluation.EvalConfig(n=2, **flags), evaluation.open_task)
        return [(task.name, task.shots) for task in tasks]

    assert opened() == [(name, None) for name in (*evaluation.SCENE_TASKS, "scenes_words")]
    few_shot = opened(tasks="scenes_cap,scenes_words", shots="0,4,4")
    assert few_shot == [("scenes_cap", 0), ("scenes_cap", 4), ("scenes_words", None)]


# --- scoring


@pytest.mark.parametrize("name", [*evaluation.SCENE_TASKS, "scenes_bind"])
def test_an_oracle_is_perfect_and_blind_swaps_the_test_picture_alone(name, monkeypatch):
    """Pictures are looked at only through load_images, answers come only from generate: both are replaced."""
    task, cfg = evaluation.scenes_task(name, 8, 0, 2), evaluation.EvalConfig(batch_size=9)
    vlm, seen, asked, real = tiny_vlm(), [], [], data.prompt_batch
    by_prompt = {prompt_text(task.prompt(q, TOKENIZER)): q for q in task.questions}
    assert len(by_prompt) == len(task.questions)

    def load_images(images, cfg, name=""):
        seen.append(images)
        return torch.zeros(len(images), 3, 32, 32, dtype=torch.uint8).numpy()

    def prompt_batch(samples, mode, cfg):
        asked[:] = zip([by_prompt[prompt_text(pieces)] for pieces, *_ in samples], seen[-len(samples) :])
        return real(samples, mode, cfg)

    def generate(batch, end, most, stops=()):
        """The right answer for the right pictures, then on to a next example, as a base model would."""
        answers = []
        for q, shown in asked:
            false = "no" if q.answers[0] == "yes" else "yes"
            answers.append(q.answers[0] if shown[-1] == q.images[0] else false)
        return [TOKENIZER.encode(text + "\nQuestion: more") for text in answers]

    monkeypatch.setattr(data, "load_images", load_images)
    monkeypatch.setattr(data, "prompt_batch", prompt_batch)
    monkeypatch.setattr(vlm, "generate", generate)
    rows, _ = evaluation.score_task(vlm, TOKENIZER, task, "full", cfg)
    perfect = evaluation.cider_d([q.answers[0] for q in task.questions], [q.answers for q in task.questions])
    expected = 100 * sum(perfect) / len(perfect) if name == "scenes_cap" else 100
    assert rows[0]["score"] == pytest.approx(expected, abs=0.01) and rows[0]["shots"] == 2
    assert rows[0]["blind_score"] == 0
    n = len(task.questions)
    assert len(seen) == 2 * n
    true = Counter(tuple(images) for images in seen[:n])
    assert true == Counter((*(d.image for d in q.demos), *q.images) for q in task.questions)
    blind = {tuple(images[:2]): images[2] for images in seen[n:]}
    for question in task.questions:  # demonstrations stay true
        assert blind[tuple(d.image for d in question.demos)] != question.images[0]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "pruned"])
@pytest.mark.parametrize("shots", [None, 2])
def test_likelihood_is_the_sum_over_the_answers_tokens(mode, shots):
    """One candidate at a time through prompt_batch, log-softmax and gather, against all in one batch."""
    vlm, task = tiny_vlm(), evaluation.scenes_task("scenes_vqa", 2, 0, shots)
    samples, options, expected = [], [], []
    for question in task.questions[:6]:
        shown = [*(demo.image for demo in question.demos), *question.images]
        samples.append((task.prompt(question, TOKENIZER), data.load_images(shown, vlm.cfg)))
        options.append([TOKENIZER.encode(text) for text in ("red", "blue", "two words here", "0")])
        for ids in options[-1]:
            batch = data.prompt_batch([([*samples[-1][0], (ids, True)], samples[-1][1])], mode, vlm.cfg)
            rows = batch.student
            x = vlm.splice(rows, vlm.bank(batch))
            hidden, _ = vlm.decoder.hidden(x, rows.positions, model.document_mask(rows.doc_ids))
            logits = vlm.decoder.head(hidden[0, -len(ids) - 1 : -1]).log_softmax(-1)
            expected.append(sum(logits[t, i].item() for t, i in enumerate(ids)))
    sums = evaluation.answer_likelihoods(vlm, samples, options, mode)
    assert [len(each) for each in sums] == [4] * 6
    assert [x for each in sums for x in each] == pytest.approx(expected, abs=1e-3)
    cfg = evaluation.EvalConfig(scoring="likelihood", batch_size=20)
    images = [q.images for q in task.questions]
    said = evaluation.answer_all(vlm, TOKENIZER, task, images, mode, cfg)
    assert all(answer in q.choices for answer, q in zip(said, task.questions))
    question, sample = task.questions[0], samples[0]
    choices = [TOKENIZER.encode(choice) for choice in question.choices]
    (best,) = evaluation.answer_likelihoods(vlm, [sample], [choices], mode)
    assert said[0] == question.choices[best.argmax()]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, OTHERS[0]], ids="scenes gpt2".split())
@pytest.mark.parametrize("shots", [None, 1])
def test_candidates_have_the_tokens_that_answers_have_in_documents(tokenizer, shots, monkeypatch):
    task, seen = evaluation.scenes_task("scenes_pope", 3, 0, shots), []

    def answer_likelihoods(vlm, samples, options, mode):
        seen.extend(options)
        return [np.array([0.0, 1.0])] * len(samples)

    monkeypatch.setattr(evaluation, "answer_likelihoods", answer_likelihoods)
    cfg, images = evaluation.EvalConfig(scoring="likelihood"), [q.images for q in task.questions]
    assert evaluation.answer_all(tiny_vlm(), tokenizer, task, images, "full", cfg) == ["yes"] * 3
    expected = "noyes" if tokenizer is OTHERS[0] and shots is None else " no yes"  # the chat template's turn
    assert {check.text_of(sum(options, []), tokenizer) for options in seen} == {expected}


def test_choices_hold_every_right_answer(tmp_path):
    for name in ("scenes_vqa", "scenes_pope", "scenes_bind"):
        for question in evaluation.scenes_task(name, 40, 0, 0).questions:
            assert question.answers[0] in question.choices
    data.render(data.make_scene("test", 1), 32).save(tmp_path / "0.png")
    for kind, answer, choices in (("choice", "B", ("A", "B")), ("yesno", "Yes", ("no", "yes"))):
        row = {"image": "0.png", "text": "Which?\nA. red\nB. blue", "answers": [answer]}
        (tmp_path / "q.jsonl").write_text(json.dumps(row))
        assert evaluation.file_task(kind, tmp_path / "q.jsonl", "").questions[0].choices == choices


@torch.no_grad()
def test_generation_ends_behind_a_stop_and_is_cut_in_front_of_it():
    vlm, task = tiny_vlm(), evaluation.scenes_task("scenes_vqa", 1, 0, 0)
    samples = [(task.prompt(q, TOKENIZER), data.load_images(q.images, vlm.cfg)) for q in task.questions]
    batch = data.prompt_batch(samples, "full", vlm.cfg)
    free = vlm.generate(batch, TOKENIZER.vocab_size, 8)  # an end that no arg max takes
    never = next(i for i in range(TOKENIZER.vocab_size) if i not in sum(free, []))
    stop = free[0][2]
    ends = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert vlm.generate(batch, never, 8, stops=[stop]) == ends and len(ends[0]) <= 3
    vqa, caption, chat = (
        evaluation.stop_marks(evaluation.Task("t", kind, [], shots=shots))
        for kind, shots in (("vqa", 0), ("caption", 0), ("vqa", None))
    )
    assert chat == ()
    for text, short, long in [
        (" red\n", "red", "red"), ("red, blue", "red", "red, blue"), ("red. A", "red", "red. A"),
        ("red Question: x", "red", "red Question: x"), ("\nred", "", ""), ("a b", "a b", "a b"),
    ]:  # fmt: skip
        assert evaluation.cut_answer(text, vqa) == short and evaluation.cut_answer(text, caption) == long


def test_boxes_may_hold_commas_and_files_are_told_apart(tmp_path):
    ref = evaluation.stop_marks(evaluation.scenes_task("scenes_ref", 1, 0, 0))
    assert evaluation.cut_answer(" [12, 34, 56, 78]\n[", ref) == "[12, 34, 56, 78]"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        data.render(data.make_scene("test", 1), 32).save(tmp_path / folder / "0.png")
        row = {"image": "0.png", "text": "?", "answers": ["x"]}
        (tmp_path / folder / "val.jsonl").write_text(json.dumps(row))
    tasks = f"vqa:{tmp_path}/a/val.jsonl,caption:{tmp_path}/b/val.jsonl"
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "b/0.png", "text": "?", "answers": ["x"]}))
    with pytest.raises(UserError, match="two tasks of one name"):
        evaluation.open_tasks(evaluation.EvalConfig(tasks=tasks), evaluation.open_task)
    (tmp_path / "b" / "val.jsonl").rename(tmp_path / "b" / "other.jsonl")
    tasks = tasks.replace("b/val", "b/other")
    with pytest.raises(UserError, match="caption and vqa"):
        cfg = evaluation.EvalConfig(tasks=tasks, demos=str(tmp_path / "d.jsonl"), shots="0")
        evaluation.open_tasks(cfg, evaluation.open_task)


def test_a_token_that_ends_an_answer_may_hold_some_of_it(monkeypatch):
    """Byte-pair encoders of others have tokens such as ".\\n": they stop a caption and their period stays."""
    ranks = data.read_ranks(model.ASSETS / "scenes.tiktoken")
    ranks[b".\n"] = len(ranks)
    tokenizer = data.RankTokenizer(ranks, {})
    vlm, task, seen = tiny_vlm(), evaluation.scenes_task("scenes_cap", 1, 0, 0), []

    def generate(batch, end, most, stops=()):
        seen.extend(stops)
        return [[*tokenizer.encode("a red ring"), ranks[b".\n"]]]

    monkeypatch.setattr(vlm, "generate", generate)
    images = [q.images for q in task.questions]
    answers = evaluation.answer_all(vlm, tokenizer, task, images, "full", evaluation.EvalConfig())
    assert answers == ["a red ring."]
    assert ranks[b".\n"] in seen and ranks[b"\n"] in seen and ranks[b"."] not in seen


def test_prompts_longer_than_the_decoders_context_are_refused():
    task = evaluation.scenes_task("scenes_vqa", 1, 0, 8)
    images = [q.images for q in task.questions]
    for mode in ("full", "pruned"):
        with pytest.raises(UserError, match=r"scenes_vqa: .*trained for 150: use"):
            evaluation.answer_all(
                tiny_vlm(context=150), TOKENIZER, task, images, mode, evaluation.EvalConfig()
            )
    prompts = {i: task.prompt(q, TOKENIZER) for i, q in enumerate(task.questions)}
    shown = {i: [*(d.image for d in q.demos), *q.images] for i, q in enumerate(task.questions)}
    longest = task.max_new_tokens + max(8 * 9 + len(token_ids(pieces)) for pieces in prompts.values())
    cfg = tiny_vlm(context=longest).cfg
    assert max(evaluation.prompt_lengths(task, prompts, shown, cfg, "full").values()) == longest  # just fits
    cfg.decoder.context -= 1
    with pytest.raises(UserError, match=f"take {longest} positions"):
        evaluation.prompt_lengths(task, prompts, shown, cfg, "full")


# --- the loss on text


@torch.no_grad()
def test_text_loss_is_cross_entropy_per_token(tmp_path, capsys):
    vlm, task = tiny_vlm(), evaluation.scenes_task("scenes_words", 7, 0)
    rows, shown = evaluation.score_task(vlm, TOKENIZER, task, "full", evaluation.EvalConfig(batch_size=3))
    losses, counts = [], []
    for question in task.questions:
        ids = torch.tensor([*TOKENIZER.encode(question.text), TOKENIZER.end])
        logits = vlm.decoder(ids[None])[0, :-1]
        losses.append(F.cross_entropy(logits, ids[1:], reduction="sum").item())
        counts.append(len(ids) - 1)
    row = rows[0]
    assert row["score"] == pytest.approx(sum(losses) / sum(counts), abs=2e-4)
    assert (row["metric"], row["n"], row["blind_score"], row["chance"]) == ("nll_per_token", 7, None, None)
    assert shown == [] and len(rows) == 1 and 0 < row["stderr"] < 1
    train = {data.Scenes("text")[i].parts[0] for i in range(50)}
    assert not train & {q.text for q in task.questions}
    evaluation.print_table(rows)
    printed = capsys.readouterr().out.splitlines()[-1]
    assert f"{row['score']:.3f}" in printed and printed.count("–") == 2
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": q.text}) + "\n" for q in task.questions))
    own = evaluation.file_task("text", path, "")
    rows, _ = evaluation.score_task(vlm, TOKENIZER, own, "full", evaluation.EvalConfig())
    assert rows[0]["score"] == row["score"]
    path.write_text('{"text": 3}\n')
    with pytest.raises(UserError, match="t.jsonl line 1"):
        evaluation.file_task("text", path, "")


# --- scenes_bind and the documents


def test_who_ignores_the_binding_is_at_chance():
    task = evaluation.scenes_task("scenes_bind", 800, 0, 4)
    kinds = {kind: [q for q in task.questions if q.subsets[0] == kind] for kind in ("name", "yes_no")}
    assert [*map(len, kinds.values())] == [400, 400]

    def score(strategy) -> dict[str, float]:
        return {
            kind: sum(strategy(q) == q.answers[0] for q in kinds[kind]) / 4 for kind in kinds
        }  # of 400, in %

    def thing(q):
        return thing_at(q.images[0], q.text)

    def plain(q):  # what it is called
        return thing(q).colour if "colour" in q.text else thing(q).shape

    def word(q):
        return next(d.answer for d in q.demos if d.answer in data.MADE_UP)

    assert score(lambda q: "yes")["yes_no"] == score(lambda q: "no")["yes_no"] == 50
    assert score(plain)["name"] == score(word)["name"] == 50
    three = 3 * 50 / 400**0.5
    for copy in (
        lambda q: q.demos[-1].answer,
        lambda q: q.demos[0].answer,
        lambda q: Counter(d.answer for d in q.demos).most_common(1)[0][0],
    ):
        assert max(score(copy).values()) <= 50 + three
    # Nothing of picture and thing tells which it will be, whatever is said of it: the word fits any alike.
    for feature in (
        lambda q: thing(q).colour in ("red", "blue", "green"),  # test scenes have more of these
        lambda q: sum(t.colour == thing(q).colour for t in q.images[0].things) > 1,
        lambda q: sum(t.shape == thing(q).shape for t in q.images[0].things) > 1,
        lambda q: len(q.images[0].things) > 3,
    ):
        for kind, (a, b) in {"name": (plain, word), "yes_no": (lambda q: "yes", lambda q: "no")}.items():
            right = score(lambda q: a(q) if feature(q) else b(q))[kind]
            assert abs(right - 50) <= three, kind
    assert task.chance == 50


def test_demonstrations_of_a_binding_settle_it():
    """Pictures and answers leave one meaning for the word, and with it every answer follows: 100 %."""
    task, pairings = evaluation.scenes_task("scenes_bind", 200, 0, 4), set()
    for question in task.questions:
        (word,) = {d.answer for d in question.demos} & {*data.MADE_UP}
        meanings = []
        for meaning in (*data.COLOURS, *data.SHAPES):
            if all(agrees(demo, word, meaning) for demo in question.demos):
                meanings.append(meaning)
        assert len(meanings) == 1, question.demos
        asked = data.Example(question.images[0], question.text, question.answers[0])
        assert agrees(asked, word, meanings[0])
        pairings.add((word, meanings[0]))
    assert len(pairings) > 60  # of 84: no word has a fixed meaning
    assert {word for word, _ in pairings} == {*data.MADE_UP}


def thing_at(scene: data.Scene, question: str) -> data.Thing:
    """The thing at the place that a question names."""
    place = re.search(f"is (?:the )?({'|'.join(data.PLACES)})\\b", question)[1]
    return next(thing for thing in scene.things if data.PLACES[thing.cell] == place)


def agrees(example: data.Example, word: str, meaning: str) -> bool:
    """Whether the answer is right if the word stands for that."""
    thing = thing_at(example.image, example.question)
    fits = meaning in (thing.colour, thing.shape)
    if example.question.startswith("is the"):
        return example.answer == data.YES_NO[fits]
    attribute = "colour" if "colour" in example.question else "shape"
    known = meaning in (data.COLOURS if attribute == "colour" else data.SHAPES)
    return known and example.answer == (word if fits else getattr(thing, attribute))


def test_documents_have_two_to_nine_pictures_in_three_sorts():
    counts, sorts, meanings = Counter(), Counter(), {word: set() for word in data.MADE_UP}
    for i in range(900):
        record = data.Scenes("interleaved")[i]
        pictures, texts = record.parts[::2], record.parts[1::2]
        assert pictures == [*range(len(record.images))]
        form = r"(A photo of [a-z].*\.|Question: .*\? Short answer: \S+)\n"
        assert all(re.fullmatch(form, text) for text in texts)
        counts[len(pictures)] += 1
        word = re.findall("|".join(data.MADE_UP), " ".join(texts))
        assert len(set(word)) <= 1
        captions = sum(text.startswith("A photo of") for text in texts)
        sorts["captions" if captions == len(texts) else "binding" if word else "questions"] += 1
        assert captions in (0, len(texts)) or (captions == 1 and texts[0].startswith("A photo of"))
        assert not captions or word and word[0] in texts[0]  # its words are never the ordinary ones
        for kind in ("colour", "shape"):
            for text in texts:
                if word and f"what {kind} is" in text and text.endswith(f" {word[0]}\n"):
                    meanings[word[0]].add(kind)
    assert all(kinds == {"colour", "shape"} for kinds in meanings.values())  # no word is for one thing only
    assert sorted(counts) == [*range(2, 10)] and counts[2] + counts[3] > 420 and counts[9] > 20
    assert all(abs(n - 300) < 60 for n in sorts.values()) and len(sorts) == 3


def test_captions_are_told_plainly_or_in_the_template():
    told = [data.Scenes("caption")[i] for i in range(1000)]
    assert all(len(r.images) == 1 and r.parts[0] == 0 for r in told)
    share = sum(r.parts[1] == f"A photo of {data.say(r.images[0])}" for r in told) / 1000
    assert abs(share - 0.25) < 0.05
    assert all(r.parts[1].removeprefix("A photo of ") == data.say(r.images[0]) for r in told)


def test_held_out_pairs_are_in_no_training_document_not_even_hidden():
    """Neither drawn nor told, nor asked about with the made-up word in place of one half."""
    for i in range(900):
        record = data.Scenes("interleaved")[i]
        for scene in record.images:
            assert not data.HELD_OUT & {(t.colour, t.shape) for t in scene.things}
        text = " ".join(record.parts[1::2])
        assert not any(f"{colour} {shape}" in text for colour, shape in data.HELD_OUT)
    for colour, shape in data.HELD_OUT:
        for meaning in (colour, shape):
            for seed in range(40):
                rng = random.Random(seed)
                asked = data.draw_bound("dax", meaning, False, False, rng, "train")
                thing = thing_at(asked.image, asked.question)
                assert thing.pair != (colour, shape) and asked.answer == "no"
                kept = (thing.shape, shape) if meaning == colour else (thing.colour, colour)
                assert kept[0] != kept[1]


def test_main_writes_shots_and_demonstrations(tmp_path):
    run, out = save_tiny_run(tmp_path), tmp_path / "eval.json"
    tasks = ["--tasks", "scenes_bind,scenes_words", "--n", "4", "--shots", "0,4", "--tokens", "both"]
    flags = ["--model", str(run), "--scoring", "likelihood", "--out", str(out)]
    evaluation.main([*flags, *tasks])
    summary = json.loads(out.read_text())
    rows = {(r["task"], r["shots"], r["tokens"]): r for r in summary["results"]}
    assert len(rows) == len(summary["results"]) == 2 * 2 * 3 + 1
    assert rows["scenes_bind", 4, "pruned"]["chance"] == rows["scenes_bind/name", 0, "full"]["chance"] == 50
    assert rows["scenes_words", 0, "full"]["blind_score"] is None
    assert (summary["prompt"], summary["scoring"]) == ("base", "likelihood")
    ids = summary["demos"]["scenes_bind 4-shot"]
    assert list(summary["demos"]) == ["scenes_bind 4-shot"] and len(ids) == 4
    assert all(len(each.split()) == 4 for each in ids)
    assert {example["task"] for example in summary["examples"]} == {"scenes_bind"}
    for example in summary["examples"]:
        assert example["picture"].startswith("scene:test:") and example["tokens"] == "full"
        assert example["answer"] and example["blind_answer"] and example["right"]
