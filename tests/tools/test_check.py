"""What the check of a data set tells, and its exit code."""

import pytest
from helpers import TOKENIZER, broken_set, chat, write

from model import UserError
from tools import check


def run(capsys, *words: str) -> tuple[int, str]:
    """Exit code and output; 2 for a UserError."""
    with pytest.raises((SystemExit, UserError)) as stopped:
        check.main([*words])
    code = getattr(stopped.value, "code", 2)
    return code, capsys.readouterr().out + (str(stopped.value) if code == 2 else "")


def test_it_tells_what_is_there_and_fails_if_much_is_broken(tmp_path, capsys):
    path = broken_set(tmp_path)
    code, out = run(capsys, str(path))
    assert code == 1 and "train: 200 records of kind chat" in out
    assert "usable   170, skipped 30 (15.00%)" in out
    for line in ("10 image missing", "10 image broken", "10 malformed", "record 3: image", "130 records"):
        assert line in out
    assert "[[ It is number" in out or "[[ Text" in out  # the learned part of a sample
    assert "learned text in [[ ]]" in out and "30 of 200 records would be skipped" in out
    write(path, [*(chat(None, "Q?", f"{i}. \x1b[31m<|end|>") for i in range(300)), chat("gone.png")])
    code, out = run(capsys, str(path), "--workers", "2")
    assert code == 0 and "usable   300, skipped 1 (0.33%)" in out
    assert "\x1b" not in out  # of the data's own


def test_it_counts_what_a_plain_loop_counts(tmp_path, capsys):
    answers = [" ".join(["word"] * (1 + i % 40 * 6)) for i in range(150)]
    path = write(tmp_path / "x.json", [chat(None, "Say it:", answer) for answer in answers])
    code, out = run(capsys, str(path), *"--row_limit 160 --workers 1 --samples 0".split())
    lengths, learned, text, cut = [], 0, 0, 0
    for answer in answers:
        head, tail = len(TOKENIZER.encode("Say it:")) + 2, len(TOKENIZER.encode(answer)) + 1
        kept = min(160, head + tail)
        lengths.append(kept)
        learned, text, cut = learned + kept - head, text + kept, cut + (head + tail > 160)
    assert code == 0 and f"learned  {learned / text:.1%} of {text:,} tokens of text" in out
    assert f"cut      {cut:,} records" in out and cut
    assert f"length   {min(lengths)} to {max(lengths)} positions" in out


def test_it_takes_every_kind(capsys):
    code, out = run(capsys, *"scenes --stage pretrain --limit 64 --workers 1".split())
    kinds = ("caption", "chat", "interleaved", "text")
    assert code == 0 and all(f"64 records of kind {kind}" in out for kind in kinds)
    assert out.count("<picture>") >= 3 * 3
    for words, message in (("--limit 3", "what to check?"), ("nowhere.json", "nowhere.json: no such file")):
        code, out = run(capsys, *words.split())
        assert code == 2 and message in out and "\n" not in out


def test_it_takes_the_limits_of_the_recipe(tmp_path, capsys):
    path = write(tmp_path / "x.json", [chat(None, "word " * 300, "Yes.")] * 40)
    code, out = run(capsys, str(path), "--workers", "1")
    assert code == 1 and "40 no answer within the limit" in out and "within 256 positions" in out
    code, out = run(capsys, str(path), "--workers", "1", "--row_length", "1024")
    assert code == 0 and "usable   40" in out
    write(path, [chat(None, "Say <image>.", "Yes.")] * 3)
    assert "3 records have <image> as text" in run(capsys, str(path))[1]
