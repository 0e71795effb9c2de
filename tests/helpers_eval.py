"""Helpers of the tests of eval.py and of what is built on it: a tiny model, its checkpoint, prompts."""

import functools
from pathlib import Path

import helpers
from helpers import TOKENIZER

from tools import check

tiny_vlm = functools.partial(helpers.tiny_vlm, tied=True)


def save_tiny_run(folder: Path, seed: int = 0) -> Path:
    """A checkpoint that eval.py loads."""
    step = folder / "step-00000001"
    tiny_vlm(seed=seed).save_pretrained(step, {"stage": "pretrain", "train": {"init": "", "seed": 0}})
    TOKENIZER.save(step / "tokenizer")
    return step


def prompt_text(pieces: list, tokenizer=TOKENIZER) -> str:
    """A prompt as text, pictures as [n]."""
    return "".join(f"[{p}]" if isinstance(p, int) else check.text_of(p[0], tokenizer) for p in pieces)
