"""Makes the shipped halves of the demo anew (`make assets`), and the README's picture of attention.

    python tools/make_assets.py tokenizer           assets/scenes.tiktoken: all 256 bytes, and merges
    python tools/make_assets.py vit                 assets/tiny_vit, then `probe`
    python tools/make_assets.py lm --minutes 18     assets/tiny_lm
    python tools/make_assets.py probe               what a linear read-out finds in the shipped encoder
    python tools/make_assets.py scene               assets/scene.png, about which the README asks
    python tools/make_assets.py scales              assets/scales.png, from what `make demo` left

The merges are learned from scenes in words. The encoder is CLIP-shaped and has seen pictures of both of the
demo's resolutions, no text: every patch names colour, kind, word and box of whatever covers it (dense
supervision). The decoder is Llama-shaped and has read scenes in words, and questions about them. It never saw
a picture, so what it can answer without one is the blind score.
"""

import base64
import collections
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import model
import train_pretrain
from tools import export, report


@dataclass
class AssetsConfig:
    minutes: float = 25.0  # how long to train
    threads: int = 2  # of torch


def main(argv: list[str]) -> None:
    cfg, part = AssetsConfig(), "".join(argv[:1])
    makers = {
        "tokenizer": make_tokenizer,
        "vit": make_vit,
        "lm": make_lm,
        "probe": probe,
        "scene": make_scene_picture,
        "scales": make_scales,
    }
    model.parse_cli(argv if part.startswith("-") else argv[1:], __doc__, cfg)
    model.require_one_of("what to make:", part, makers)
    torch.set_num_threads(cfg.threads)
    makers[part](cfg)


class Clock:
    """A share of the time given, behind a progress bar in seconds."""

    def __init__(self, minutes: float):
        self.start, self.seconds, self.share = time.time(), 60 * minutes, 0.0
        self.bar = tqdm(total=round(self.seconds), unit="s")

    def tick(self) -> None:
        self.share = min(1.0, (time.time() - self.start) / self.seconds)
        self.bar.n = round(self.share * self.seconds)
        self.bar.refresh()
        if self.share == 1:
            self.bar.close()


def make_optimizer(parameters, muon_lr: float, lr: float = 2.5e-3) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else, faster for the token table."""
    inner, table, others = [], [], []
    for name, p in parameters:
        if p.ndim == 2 and "layers." in name:
            inner.append(p)
        elif "embed_tokens" in name:
            table.append(p)
        else:
            others.append(p)
    groups = [{"params": inner, "lr": muon_lr, "weight_decay": 0.01}]
    muon = train_pretrain.Muon(groups, model.fast_dtype(torch.device("cpu")))
    groups = [{"params": others, "lr": lr}]
    if table:
        groups.append({"params": table, "lr": 5 * lr})
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def step_all(optimizers: list[torch.optim.Optimizer], step: int, share: float) -> None:
    """One update at a rate that follows the clock: warm-up of 50 steps, cosine over the time given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak", group["lr"])
            group["lr"] = peak * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * share))
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer: plain byte-pair encoding over the words of Scenes


def make_tokenizer(_: AssetsConfig, merges: int = 208) -> None:
    """Learn merges from captions and chats; words in pictures are left out, so they stay letters."""
    counts = count_pieces()
    words = {piece: [bytes([b]) for b in piece.encode()] for piece in counts}
    ranks = {bytes([i]): i for i in range(256)}
    for _ in range(merges):
        pairs = collections.Counter()
        for piece, tokens in words.items():
            for pair in zip(tokens, tokens[1:]):
                pairs[pair] += counts[piece]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        for piece, tokens in words.items():
            words[piece] = merge(tokens, best)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (model.ASSETS / "scenes.tiktoken").write_text("".join(lines))
    print(f"{len(ranks)} ranks; last merges: {list(ranks)[-8:]}")


def count_pieces() -> collections.Counter:
    """How often each piece of text, as the tokenizer cuts it, occurs in 4,000 scenes."""
    counts = collections.Counter()
    for i in range(4000):
        scene = data.make_scene("train", i)
        texts = [data.say(scene)]
        for _, content in data.chat_about(scene, [], random.Random(i), "train"):
            texts += content
        for text in texts:
            text = text.replace(scene.word, "") if scene.word else text
            counts.update(regex.findall(data.RANK_FILES["scenes"]["pattern"], " " + text))
    for text in (data.CAPTION_PROMPT, " ".join(data.MADE_UP)):
        counts.update(
            {piece: 50 for piece in regex.findall(data.RANK_FILES["scenes"]["pattern"], " " + text)}
        )
    return counts


def merge(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


# ---------------------------------------------------------------------------------------------------------
# Encoder: dense supervision on single pictures


KINDS = (*data.SHAPES, "word", "paper")


def dense_targets(scene: data.Scene, side: int) -> np.ndarray:
    """Colour, kind, three letters, box (x0 y0 x1 y1 in 0..1) of each of side x side patches: (side^2, 9)."""
    centre = (np.arange(side) + 0.5) * data.CANVAS / side
    x, y = np.meshgrid(centre, centre)
    target = np.zeros((side, side, 9), dtype=np.float32)
    target[..., 0], target[..., 1] = len(data.COLOURS), KINDS.index("paper")
    target[..., 2:5] = len(data.LETTERS)
    boxes = [(thing.x, thing.y, thing.radius, thing.radius, thing) for thing in scene.things]
    if scene.word:
        boxes.append((*scene.word_xy, 19, 8, None))
    for cx, cy, rx, ry, thing in boxes:
        slack = 0.35 * data.CANVAS / side  # a patch belongs to what covers its middle, or nearly does
        inside = (abs(x - cx) < rx + slack) & (abs(y - cy) < ry + slack)
        target[inside, 1] = KINDS.index(thing.shape if thing else "word")
        if thing:
            target[inside, 0] = list(data.COLOURS).index(thing.colour)
        else:
            target[inside, 2:5] = [data.LETTERS.index(letter) for letter in scene.word]
        target[inside, 5:9] = np.array([cx - rx, cy - ry, cx + rx, cy + ry]) / data.CANVAS
    return target.reshape(-1, 9)


class DenseHead(nn.Module):
    """Linear read-outs of every patch; thrown away after training."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [len(data.COLOURS) + 1, len(KINDS)] + 3 * [len(data.LETTERS) + 1] + [4]
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, patches: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """patches (I, P, D), target (I, P, 9) -> loss; on what is not paper the accuracy of colour, kind and
        letters, and the error of the box
        """
        *logits, box = self.out(patches).split(self.sizes, -1)
        classes = target[..., :5].long()
        thing = (classes[..., 1] < KINDS.index("word")).float()
        word = (classes[..., 1] == KINDS.index("word")).float()
        paper = 1 - thing - word
        weights = [thing + 0.1 * (1 - thing), 1 - 0.8 * paper] + 3 * [word]  # in the loss
        scored = [thing, 1 - paper] + 3 * [word]
        loss, right = 0.0, []
        for k, weight in enumerate(weights):
            losses = F.cross_entropy(logits[k].flatten(0, 1), classes[..., k].flatten(), reduction="none")
            mean = (losses * weight.flatten()).sum() / weight.sum().clamp(min=1)
            loss = loss + mean * (0.5 if k > 1 else 1)
            hit = (logits[k].argmax(-1) == classes[..., k]).float() * scored[k]
            right.append((hit.sum() / scored[k].sum().clamp(min=1)).item())
        error = ((box - target[..., 5:]).abs().mean(-1) * (1 - paper)).sum() / (1 - paper).sum()
        return loss + 4 * error, [*right[:2], sum(right[2:]) / 3, error.item()]


def make_vit(cfg: AssetsConfig) -> None:
    torch.manual_seed(0)
    vit = model.ViT(model.ViTConfig(image_size=64))  # 128 px by resizing positions, as scale_up does it
    head = DenseHead(vit.cfg.width)
    trained = [(name, p) for name, p in vit.named_parameters() if "post_layernorm" not in name]
    trained += [(f"head.{name}", p) for name, p in head.named_parameters()]
    optimizers, clock, step = make_optimizer(trained, 0.02), Clock(cfg.minutes), 0
    while clock.share < 1:
        size, batch = (64, 64) if step % 2 == 0 else (128, 32)
        loss, right = dense_step(vit, head, range(step * 64, step * 64 + batch), size, "train")
        loss.backward()
        step_all(optimizers, step, clock.share)
        step += 1
        if step % 100 < 2:
            scores = " ".join(f"{score:.3f}" for score in right)
            line = f"step {step} size {size} loss {loss.item():.3f} colour/kind/letters/box {scores}"
            clock.bar.write(line, file=sys.stderr)
        clock.tick()
    export.save_vit(vit, model.ASSETS / "tiny_vit", torch.float16)
    image = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3, "size": {"shortest_edge": 64}}
    model.write_json(model.ASSETS / "tiny_vit" / "preprocessor_config.json", image)
    probe(cfg)


def dense_step(vit, head, numbers: range, size: int, split: str):
    """Loss and scores of the head on scenes of these numbers, in pictures of size x size pixels."""
    scenes = [data.make_scene(split, number) for number in numbers]
    pixels = torch.from_numpy(np.stack([data.to_pixels(data.render(s, size), size) for s in scenes]))
    target = torch.from_numpy(np.stack([dense_targets(s, size // vit.cfg.patch_size) for s in scenes]))
    with torch.autocast("cpu", torch.bfloat16):
        states = vit.hidden_states((pixels.float() / 255 - 0.5) / 0.25)
    return head(states[-1][:, 1:].float(), target)


def probe(_: AssetsConfig, steps: int = 300) -> None:
    """A linear read-out trained on the frozen shipped encoder, scored on test scenes, at both resolutions."""
    for size in (64, 128):
        for level in (2, 4):
            vit = model.ViT.from_pretrained(model.ASSETS / "tiny_vit").requires_grad_(False)
            vit.encoder["layers"] = vit.encoder["layers"][:level]
            torch.manual_seed(0)
            head = DenseHead(vit.cfg.width)
            optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
            for step in range(steps):
                first = 10**7 + step * 32
                loss, _ = dense_step(vit, head, range(first, first + 32), size, "train")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                _, right = dense_step(vit, head, range(400), size, "test")
            names = ("colour", "kind", "letters", "box error")
            scores = " ".join(f"{name} {value:.3f}" for name, value in zip(names, right))
            print(f"linear probe, {size} px, level {level}: {scores}")


# ---------------------------------------------------------------------------------------------------------
# Decoder: text only


def say(scene: data.Scene, rng: random.Random | None, boxes: bool) -> str:
    """A scene in one sentence, perhaps with each thing's box behind its name."""
    boxes_of = {f"{data.PLACES[thing.cell]} {thing.name}": f" [{thing.box}]" for thing in scene.things}
    phrases = data.say(scene, rng).removesuffix(".").split(", ")
    return ", ".join(phrase + (boxes_of.get(phrase, "") if boxes else "") for phrase in phrases) + "."


def text_record(i: int) -> data.Record:
    """Mostly a scene in words, where the picture will be, then questions; some plain documents."""
    rng = random.Random(f"train-lm-{i}")
    scene = data.make_scene("train", rng.randrange(1 << 40))
    if rng.random() < 0.5:  # simple stories first of all: without them looking things up is learned very late
        scene = replace(scene, things=scene.things[: rng.randint(1, 3)])
    draw = rng.random()
    if draw < 0.08:
        return data.Record("text", [data.facts_about(scene, rng)], [])
    if draw < 0.16:
        return data.Record("text", made_up_words(scene, rng), [])
    boxes = rng.random() < 0.1  # boxes are long
    story = say(scene, rng if rng.random() < 0.3 else None, boxes) + "\n"
    kinds = data.SCENE_QUESTIONS if boxes else [kind for kind in data.SCENE_QUESTIONS if kind != "ref"]
    turns = []
    for question in data.ask_many(scene, kinds, 10, rng, "train"):
        turns += [("user", [question.question]), ("assistant", [question.answer])]
    turns[0] = ("user", [story, *turns[0][1]])
    return data.Record("chat", turns, [])


def made_up_words(scene: data.Scene, rng: random.Random) -> list[str]:
    """A made-up word stands for a colour or shape of the scene, as in interleaved documents."""
    colours, shapes = [thing.colour for thing in scene.things], [thing.shape for thing in scene.things]
    meaning, word = rng.choice(colours + shapes), rng.choice(data.MADE_UP)
    texts = []
    for one in (scene, data.make_scene("train", rng.randrange(1 << 40))):
        texts.append(data.say(one) + "\n" + data.say(one).replace(meaning, word) + "\n")
    return texts


def text_batch(first: int, n: int, tokenizer: data.Tokenizer) -> data.Rows:
    laid = []
    for i in range(first, first + n):
        pieces = data.pieces_of(text_record(i), tokenizer)
        if i % 4 == 0:  # plain language modelling: descriptions and questions, too
            pieces = [(ids, True) for ids, _ in pieces]
        laid.append(data.lay_out(data.split(pieces, [], 256)[0], []))
    return data.make_rows(laid, 256)


def make_lm(cfg: AssetsConfig) -> None:
    torch.manual_seed(0)
    folder, tokenizer = model.ASSETS / "tiny_lm", data.find_tokenizer(model.ModelConfig())
    lm = model.Decoder(model.DecoderConfig(vocab_size=tokenizer.vocab_size, kv_heads=4, tied=False))
    nn.init.normal_(lm.embed_tokens.weight)  # unit variance: the residual stream starts as the token itself
    for block in lm.layers:
        block.compile(fullgraph=True, dynamic=True)
    optimizers, clock, step = make_optimizer(lm.named_parameters(), 0.01), Clock(cfg.minutes), 0
    while clock.share < 1:
        loss, _ = text_step(lm, text_batch(step * 32, 32, tokenizer))
        loss.backward()
        step_all(optimizers, step, clock.share)
        step += 1
        if step % 500 == 0:
            export.save_decoder(lm, folder, torch.float16)
            line = f"step {step} loss {loss.item():.3f} {score_text(lm, tokenizer, 48)}"
            clock.bar.write(line, file=sys.stderr)
        clock.tick()
    export.save_decoder(lm, folder, torch.float16)
    print(f"{step} steps of 32;", score_text(model.Decoder.from_pretrained(folder), tokenizer, 500))


def text_step(lm: model.Decoder, rows: data.Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and logits (R, N) of the supervised positions."""
    with torch.autocast("cpu", torch.bfloat16):
        x, mask = lm.embed_tokens(rows.ids), model.document_mask(rows.doc_ids)
        hidden, _ = lm.hidden(x, rows.positions, mask)
        logits = lm.head(hidden.flatten(0, 1)[rows.supervised])
    return F.cross_entropy(logits.float(), rows.targets), logits


@torch.no_grad()
def score_text(lm: model.Decoder, tokenizer: data.Tokenizer, n: int) -> str:
    """Share of answers about unseen scenes in words whose tokens are all right, given those before them; by
    type of question.
    """
    right, total = collections.Counter(), collections.Counter()
    for i in range(n):
        rng = random.Random(f"score-{i}")
        scene = data.make_scene("test", i)
        for question in data.ask_many(scene, data.SCENE_QUESTIONS, 8, rng, "test"):
            story = say(scene, None, question.kind == "ref") + "\n"
            turns = [("user", [story, question.question]), ("assistant", [question.answer])]
            laid = data.lay_out(data.chat_pieces(turns, tokenizer), [])
            rows = data.make_rows([laid], 64)
            _, logits = text_step(lm, rows)
            total[question.kind] += 1
            right[question.kind] += bool((logits.argmax(-1) == rows.targets).all())
    return " ".join(f"{kind} {100 * right[kind] / total[kind]:.0f}" for kind in sorted(total))


def make_scene_picture(_: AssetsConfig) -> None:
    """assets/scene.png: the unseen scene that the README asks about."""
    data.render(data.make_scene("test", 7)).save(model.ASSETS / "scene.png")


def make_scales(_: AssetsConfig, run: str = "runs/demo/sft") -> None:
    """assets/scales.png: the report's section on attention for one unseen scene, as Chromium shows it."""
    step = model.find_step(run)
    image = data.render(data.make_scene("test", 0))
    scales = report.draw_scales(model.VLM.from_pretrained(step).eval(), step, image)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "scales.html"
        report.write_report(page, "", [], [], [], {}, [], scales)
        flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
            --disable-background-networking --disable-component-update --hide-scrollbars""".split()
        flags += [f"--user-data-dir={folder}/user", f"--screenshot={model.ASSETS / 'scales.png'}"]
        subprocess.run(["chromium", *flags, "--window-size=1000,950", page.as_uri()], check=True)


if __name__ == "__main__":
    model.run_cli(main)
