"""Writes tokenizer.json for a tokenizer of Hugging Face's older layout: vocab.json with merges.txt, or
encoder.json with vocab.bpe, as Qwen, SmolLM2 and GPT-2 have it.

    python tools/tokenizer.py FOLDER

SentencePiece's tokenizer.model (Vicuna, Llama-2, Mistral) takes the packages that know it: pip install
transformers sentencepiece protobuf, then in Python
transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).
"""

import os
import sys
from pathlib import Path

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
from model import UserError, read_json

LAYOUTS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert(folder: Path) -> Path:
    """folder/tokenizer.json. These files do not say how text is cut: where the ChatML tokens stand does."""
    layout = [names for names in LAYOUTS if all((folder / name).is_file() for name in names)]
    if not layout:
        raise UserError(f"{folder} has neither vocab.json with merges.txt nor encoder.json with vocab.bpe")
    vocab_file, merges_file = (folder / name for name in layout[0])
    vocab = read_json(vocab_file)
    try:
        bpe = tokenizers.models.BPE.from_file(str(vocab_file), str(merges_file))
    except Exception as e:  # it raises nothing more precise
        raise UserError(f"{vocab_file} and {merges_file} do not fit: {e}") from None
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = decoders.ByteLevel()
    byte_level, names = pre_tokenizers.ByteLevel(add_prefix_space=False), CHATML
    if "<|im_start|>" in vocab:  # SmolLM2
        cuts = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif "<|endoftext|>" in vocab:  # GPT-2
        cuts, names = [byte_level], CHATML[:1]
    else:  # Qwen
        byte_level.use_regex = False  # the byte alphabet without GPT-2's cuts
        cuts = [pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"), byte_level]
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    for token in added_tokens(folder) or [{"content": name} for name in names]:
        special = token.get("special", True)
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], special=special, normalized=False)])
    temporary = folder / "tokenizer.json.tmp"
    tokenizer.save(str(temporary))
    os.replace(temporary, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def added_tokens(folder: Path) -> list[dict]:
    """In the order of their ids: those that the vocabulary lacks get the next ids in this order."""
    added = {}
    if (folder / "added_tokens.json").is_file():
        for name, i in read_json(folder / "added_tokens.json").items():
            added[i] = {"content": name}
    if (folder / "tokenizer_config.json").is_file():
        config = read_json(folder / "tokenizer_config.json")
        for i, token in config.get("added_tokens_decoder", {}).items():
            added[int(i)] = token
    return [added[i] for i in sorted(added)]


def main(argv: list[str]) -> None:
    model.parse_cli([word for word in argv if word.startswith("-")], __doc__)  # --help, and no other flags
    model.require(len(argv) == 1, "give one folder: python tools/tokenizer.py FOLDER")
    print(f"in {convert(Path(argv[0]))}")


if __name__ == "__main__":
    model.run_cli(main)
