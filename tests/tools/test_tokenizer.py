"""tools/tokenizer.py: vocab.json and merges.txt give the tokenizer that the family's tokenizer.json gives."""

import json
from pathlib import Path

import pytest
from helpers_tokenizers import CONTROL, hostile, small, small_tokenizer

import data
import model
from tools import tokenizer as convert

CHATML = CONTROL["qwen"]


@pytest.mark.parametrize("kind", ["qwen", "smollm2", "gpt2"])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocab_and_merges_are_the_same_tokenizer(tmp_path, kind, names):
    whole = small_tokenizer(kind)
    write_vocab(tmp_path, kind, names)
    with pytest.raises(model.UserError, match=f"python tools/tokenizer.py {tmp_path}"):
        data.Tokenizer.from_pretrained(tmp_path)
    if kind == "qwen":  # its added tokens stand in another file, in any order
        last = len(small(kind)[0])
        added = {last + 3: {"content": "<think>", "special": False}}
        added |= {last + n: {"content": name, "special": True} for n, name in enumerate(CHATML)}
        model.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added})
    convert.main([str(tmp_path)])
    apart = data.Tokenizer.from_pretrained(tmp_path)
    assert (apart.end, apart.template) == (whole.end, whole.template)
    assert apart.special == whole.special
    assert apart.vocab_size == whole.vocab_size + (kind == "qwen")
    for text in hostile(300, 2):
        ids = apart.encode(text)
        assert ids == whole.encode(text) and apart.decode(ids) == whole.decode(ids)
    if kind == "qwen":
        assert len(apart.encode("<think>")) == 1


def write_vocab(folder: Path, kind: str, names=("vocab.json", "merges.txt")) -> None:
    vocab, merges = small(kind)
    (folder / names[0]).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_smollm_specials_are_never_text_and_a_wrong_vocabulary_is_refused(tmp_path):
    write_vocab(tmp_path, "smollm2")
    convert.convert(tmp_path)
    tokenizer = data.Tokenizer.from_pretrained(tmp_path)
    assert [*tokenizer.special.values()] == [0, 1, 2] and tokenizer.end == 2
    for name in [*CHATML, "<special_16>"]:
        assert min(tokenizer.encode(name)) >= 17 and tokenizer.decode(tokenizer.encode(name)) == name
    assert tokenizer.encode("\x05\x1c") == []  # bytes the vocabulary lacks
    assert tokenizer.encode("hello\x05") == tokenizer.encode("hello")
    assert tokenizer.encode("!\x05!") == tokenizer.encode("!!")  # dropped before merging
    assert len(tokenizer.encode("!!")) == 1
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(model.UserError, match="vocab.json and .*merges.txt do not fit"):
        convert.convert(tmp_path)
    with pytest.raises(model.UserError, match="neither vocab.json"):
        convert.convert(tmp_path / "elsewhere")
