"""Pictures in folders that say what they show, to a training file and a test file.

    python tools/folders.py pictures        pictures/cat/1.jpg, pictures/dog/…

Writes train.json and test.jsonl. A fifth of each folder is held out. Training asks about every other picture
twice, in the form of LLaVA's JSON: what it is, and which option is right. test.jsonl asks the second question
about the pictures that were held out: `python eval.py --tasks choice:test.jsonl`.
"""

import json
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
from model import require

WHAT = "What is this?"
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass
class FoldersConfig:
    train: str = "train.json"  # file to write: records to learn from
    test: str = "test.jsonl"  # file to write: questions about the held-out pictures
    held_out: float = 0.2  # share of each folder
    seed: int = 0  # of the split


def conversation(image: Path, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": str(image), "conversations": turns}


def split_folders(pictures: Path, cfg: FoldersConfig) -> tuple[list[dict], list[dict]]:
    """Records to learn from, and questions about the held-out pictures."""
    kinds = sorted(folder.name for folder in pictures.iterdir() if folder.is_dir())
    letters = string.ascii_uppercase
    require(2 <= len(kinds) <= 26, f"{pictures} has {len(kinds)} folders: give 2 to 26, one for each kind")
    options = "\n".join(f"{letter}. {kind}" for letter, kind in zip(letters, kinds))
    choice = f"{WHAT}\n{options}\n{LETTER}"
    train, test = [], []
    for letter, kind in zip(letters, kinds):
        files = sorted(file for file in (pictures / kind).iterdir() if file.is_file())
        random.Random(cfg.seed).shuffle(files)
        held_out = round(len(files) * cfg.held_out)
        for file in files[:held_out]:
            test.append({"question_id": str(file), "image": str(file), "text": choice, "answers": [letter]})
        for file in files[held_out:]:
            train += [conversation(file, WHAT, kind), conversation(file, choice, letter)]
    return train, test


def main(argv: list[str]) -> None:
    cfg = FoldersConfig()
    model.parse_cli(argv[1:] if argv and not argv[0].startswith("-") else argv, __doc__, cfg)
    require(argv and Path(argv[0]).is_dir(), "give the folder of folders: python tools/folders.py pictures")
    train, test = split_folders(Path(argv[0]), cfg)
    model.write_json(Path(cfg.train), train)
    model.write_text(Path(cfg.test), "".join(json.dumps(question) + "\n" for question in test))
    print(f"{len(train)} records to learn from in {cfg.train}, {len(test)} questions to ask in {cfg.test}")


if __name__ == "__main__":
    model.run_cli(main)
