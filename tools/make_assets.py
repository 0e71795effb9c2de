"""Makes the shipped halves of the demo anew: `python tools/make_assets.py tokenizer|vit|lm` (or `make assets`).
Also the README's picture of attention, from what `make demo` left: `python tools/make_assets.py scales`.

tokenizer  assets/scenes.tiktoken: all 256 bytes and the merges learned from Scenes told in words
vit        assets/tiny_vit: a CLIP-shaped encoder that has seen pictures of both of the demo's resolutions, no
text.
           Objective: every patch names colour, kind, word and box of whatever covers it (dense supervision).
lm         assets/tiny_lm: a Llama-shaped decoder that has read scenes told in words, and questions about
them.
           It never saw a picture, so what it can answer without one is the blind score.
"""

import argparse
import base64
import collections
import random
import subprocess
import sys
import tempfile
import time
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
import eval as evaluation
import model


def make_optimizer(parameters, muon_lr: float, lr: float = 2.5e-3) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest, with a faster rate for the token table."""
    groups = {"inner": [], "table": [], "rest": []}
    for name, p in parameters:
        inner = p.ndim == 2 and "layers." in name
        groups["inner" if inner else "table" if "embed_tokens" in name else "rest"].append(p)
    muon = torch.optim.Muon(groups["inner"], lr=muon_lr, weight_decay=0.01)
    tables = [{"params": groups["rest"], "lr": lr}]
    if groups["table"]:
        tables.append({"params": groups["table"], "lr": 5 * lr})
    return [muon, torch.optim.AdamW(tables, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def step_all(optimizers: list[torch.optim.Optimizer], step: int, done: float) -> None:
    """One update at a rate that follows the clock: warm-up of 50 steps, cosine over the time given."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak", group["lr"])
            group["lr"] = peak * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * done))
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------
# Tokenizer: plain byte-pair encoding over the words of Scenes


def make_tokenizer(merges: int = 208) -> None:
    """Learn merges from captions and chats; words in pictures are left out, so they stay letters."""
    counts = collections.Counter()
    for i in range(4000):
        rng = random.Random(i)
        scene = data.make_scene("train", i)
        told = [data.say(scene)] + [
            part for _, parts in data.chat_about(scene, [], rng, "train") for part in parts
        ]
        for text in told:
            text = text.replace(scene.word, "") if scene.word else text
            counts.update(regex.findall(data.RANK_FILES["scenes"]["pattern"], " " + text))
    for text in (data.CAPTION_PROMPT, " ".join(data.MADE_UP)):
        counts.update(
            {piece: 50 for piece in regex.findall(data.RANK_FILES["scenes"]["pattern"], " " + text)}
        )
    words = {word: [bytes([b]) for b in word.encode()] for word in counts}
    ranks = {bytes([i]): i for i in range(256)}
    for _ in range(merges):
        pairs = collections.Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        for word, parts in words.items():
            words[word] = merge(parts, best)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (model.ASSETS / "scenes.tiktoken").write_text("".join(lines))
    print(f"{len(ranks)} ranks; last merges: {list(ranks)[-8:]}")


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


# ---------------------------------------------------------------------------------------------------------
# Encoder: dense supervision on single pictures


KINDS = (*data.SHAPES, "word", "paper")


def dense_targets(scene: data.Scene, side: int) -> np.ndarray:
    """For each of side x side patches: colour, kind, three letters, box (x0 y0 x1 y1 in 0..1): (side^2,
    9).
    """
    centre = (np.arange(side) + 0.5) * data.CANVAS / side
    x, y = np.meshgrid(centre, centre)
    target = np.zeros((side, side, 9), dtype=np.float32)
    target[..., 0], target[..., 1], target[..., 2:5] = (
        len(data.COLOURS),
        KINDS.index("paper"),
        len(data.LETTERS),
    )
    boxes = [(t.x, t.y, t.radius, t.radius, t) for t in scene.things]
    if scene.word:
        boxes.append((*scene.word_xy, 19, 8, None))
    for cx, cy, rx, ry, thing in boxes:
        slack = 0.35 * data.CANVAS / side  # a patch belongs to what covers its middle, or nearly does
        inside = (abs(x - cx) < rx + slack) & (abs(y - cy) < ry + slack)
        if thing:
            target[inside, 0], target[inside, 1] = (
                list(data.COLOURS).index(thing.colour),
                KINDS.index(thing.shape),
            )
        else:
            target[inside, 1] = KINDS.index("word")
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
        """patches (I, P, D), target (I, P, 9) -> loss, accuracy of colour, kind, letters on what is not
        paper
        """
        parts = self.out(patches).split(self.sizes, -1)
        classes = target[..., :5].long()
        thing = (classes[..., 1] < KINDS.index("word")).float()
        word = (classes[..., 1] == KINDS.index("word")).float()
        paper = 1 - thing - word
        weights = [thing + 0.1 * (1 - thing), 1 - 0.8 * paper] + 3 * [word]
        loss, right = 0.0, []
        for k, weight in enumerate(weights):
            each = F.cross_entropy(parts[k].flatten(0, 1), classes[..., k].flatten(), reduction="none")
            loss = loss + (each * weight.flatten()).sum() / weight.sum().clamp(min=1) * (0.5 if k > 1 else 1)
            where = word if k > 1 else thing if k == 0 else 1 - paper
            hit = (parts[k].argmax(-1) == classes[..., k]).float() * where
            right.append((hit.sum() / where.sum().clamp(min=1)).item())
        box = ((parts[5] - target[..., 5:]).abs().mean(-1) * (1 - paper)).sum() / (1 - paper).sum()
        return loss + 4 * box, [*right[:2], sum(right[2:]) / 3, box.item()]


def make_vit(minutes: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    vit = model.ViT(
        model.ViTConfig(image_size=64)
    )  # 128 px through the bicubic position resize, as scale_up does it
    head = DenseHead(vit.cfg.width)
    trained = [*vit.named_parameters(), *(("head." + n, p) for n, p in head.named_parameters())]
    optimizers = make_optimizer([(n, p) for n, p in trained if "post_layernorm" not in n], 0.02)
    start, step, done = time.time(), 0, 0.0
    bar = tqdm(total=round(minutes * 60), unit="s")
    while done < 1:
        small = step % 2 == 0
        size, batch = (64, 64) if small else (128, 32)
        loss, right = dense_step(vit, head, range(step * 64, step * 64 + batch), size, "train")
        loss.backward()
        step_all(optimizers, step, done)
        done = min(1.0, (time.time() - start) / (minutes * 60))
        step += 1
        if step % 100 < 2:
            shown = " ".join(f"{r:.3f}" for r in right)
            bar.write(
                f"step {step} size {size} loss {loss.item():.3f} colour/kind/letters/box {shown}",
                file=sys.stderr,
            )
        bar.n = round(done * minutes * 60)
        bar.refresh()
    bar.close()
    vit.save_pretrained(model.ASSETS / "tiny_vit", torch.float16)
    mean, std = [0.5] * 3, [0.25] * 3
    model.write_json(
        model.ASSETS / "tiny_vit" / "preprocessor_config.json",
        {"image_mean": mean, "image_std": std, "resample": 3, "size": {"shortest_edge": 64}},
    )
    probe()


def dense_step(vit, head, scenes, size: int, split: str):
    drawn = [data.make_scene(split, i) for i in scenes]
    pixels = torch.from_numpy(np.stack([data.to_pixels(data.render(s, size), size) for s in drawn]))
    target = torch.from_numpy(np.stack([dense_targets(s, size // vit.cfg.patch_size) for s in drawn]))
    with torch.autocast("cpu", torch.bfloat16):
        states = vit.hidden_states((pixels.float() / 255 - 0.5) / 0.25)
    return head(states[-1][:, 1:].float(), target)


def probe(steps: int = 300) -> None:
    """A linear read-out trained on the frozen shipped encoder, scored on test scenes, at both resolutions."""
    for size in (64, 128):
        vit = model.ViT.from_pretrained(model.ASSETS / "tiny_vit")
        vit.requires_grad_(False)
        for level in (2, vit.cfg.layers):
            torch.manual_seed(0)
            head = DenseHead(vit.cfg.width)
            optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
            cut = model.ViT(vit.cfg)
            cut.load_state_dict(vit.state_dict())
            cut.encoder["layers"] = cut.encoder["layers"][:level]
            for step in range(steps):
                loss, _ = dense_step(
                    cut, head, range(10**7 + step * 32, 10**7 + step * 32 + 32), size, "train"
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                _, right = dense_step(cut, head, range(400), size, "test")
            names = ("colour", "kind", "letters", "box error")
            told = " ".join(f"{name} {value:.3f}" for name, value in zip(names, right))
            print(f"linear probe, {size} px, level {level}: {told}")


# ---------------------------------------------------------------------------------------------------------
# Decoder: text only


def text_record(i: int, split: str = "train") -> data.Record:
    """Mostly a scene told in words, where the picture will be, then questions; some plain documents."""
    rng = random.Random(f"{split}-lm-{i}")
    scene = data.make_scene(split, rng.randrange(1 << 40))
    if rng.random() < 0.5:  # simple stories first of all: without them looking things up is learned very late
        scene = data.dataclasses.replace(scene, things=scene.things[: rng.randint(1, 3)])
    draw = rng.random()
    if draw < 0.08:
        return data.Record("text", [data.facts_about(scene, rng)], [])
    if draw < 0.16:  # a made-up word stands for one colour or shape, as in interleaved documents
        meaning, word = (
            rng.choice([t.colour for t in scene.things] + [t.shape for t in scene.things]),
            rng.choice(data.MADE_UP),
        )
        told = [
            data.say(s) + "\n" + data.say(s).replace(meaning, word) + "\n"
            for s in (scene, data.make_scene(split, rng.randrange(1 << 40)))
        ]
        return data.Record("text", told, [])
    boxes = rng.random() < 0.1  # boxes are long
    told = data.say(scene, rng if rng.random() < 0.3 else None, boxes) + "\n"
    kinds = data.SCENE_QUESTIONS if boxes else [k for k in data.SCENE_QUESTIONS if k != "ref"]
    turns = []
    for _, question, answer, _ in data.ask_many(scene, kinds, 10, rng, split):
        turns += [("user", [question]), ("assistant", [answer])]
    turns[0] = ("user", [told, *turns[0][1]])
    return data.Record("chat", turns, [])


def text_batch(first: int, n: int, tokenizer: data.Tokenizer, split: str = "train") -> data.Rows:
    told = []
    for i in range(first, first + n):
        pieces = data.pieces_of(text_record(i, split), tokenizer)
        if i % 4 == 0:  # plain language modelling: descriptions and questions, too
            pieces = [(ids, True) for ids, _ in pieces]
        told.append(data.lay_out(data.split(pieces, [], 256)[0], []))
    return data.make_rows(told, 256)


def make_lm(minutes: float, seed: int = 0) -> None:
    torch.manual_seed(seed)
    tokenizer = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
    lm = model.Decoder(model.DecoderConfig(vocab_size=tokenizer.vocab_size, kv_heads=4, tied=False))
    nn.init.normal_(lm.embed_tokens.weight)  # unit variance: the residual stream starts as the token itself
    for block in lm.layers:
        block.compile(fullgraph=True, dynamic=True)
    optimizers = make_optimizer(lm.named_parameters(), 0.01)
    start, step, done = time.time(), 0, 0.0
    bar = tqdm(total=round(minutes * 60), unit="s")
    while done < 1:
        loss, _ = text_step(lm, text_batch(step * 32, 32, tokenizer))
        loss.backward()
        step_all(optimizers, step, done)
        done = min(1.0, (time.time() - start) / (minutes * 60))
        step += 1
        if step % 500 == 0:
            lm.save_pretrained(model.ASSETS / "tiny_lm", torch.float16)
            bar.write(f"step {step} loss {loss.item():.3f} {score_text(lm, tokenizer, 48)}", file=sys.stderr)
        bar.n = round(done * minutes * 60)
        bar.refresh()
    bar.close()
    lm.save_pretrained(model.ASSETS / "tiny_lm", torch.float16)
    print(
        f"{step} steps of 32;",
        score_text(model.Decoder.from_pretrained(model.ASSETS / "tiny_lm"), tokenizer, 500),
    )


def text_step(lm: model.Decoder, rows: data.Rows):
    with torch.autocast("cpu", torch.bfloat16):
        x = lm.embed_tokens(rows.ids)
        hidden = lm.hidden(x, rows.positions, model.document_mask(rows.doc_ids))
        logits = lm.head(hidden.flatten(0, 1)[rows.supervised])
    return F.cross_entropy(logits.float(), rows.targets), logits


@torch.no_grad()
def score_text(lm: model.Decoder, tokenizer: data.Tokenizer, n: int) -> str:
    """Answers about unseen scenes told in words, all tokens right given the earlier ones, by question
    type.
    """
    right, asked = collections.Counter(), collections.Counter()
    for i in range(n):
        rng = random.Random(f"score-{i}")
        scene = data.make_scene("test", i)
        for kind, question, answer, _ in data.ask_many(scene, data.SCENE_QUESTIONS, 8, rng, "test"):
            told = data.say(scene, None, kind == "ref") + "\n"
            pieces = data.chat_pieces([("user", [told, question]), ("assistant", [answer])], tokenizer)
            laid = data.lay_out(pieces, [])
            rows = data.make_rows([laid], 64)
            _, logits = text_step(lm, rows)
            asked[kind] += 1
            right[kind] += bool((logits.argmax(-1) == rows.targets).all())
    return " ".join(f"{k} {100 * right[k] / asked[k]:.0f}" for k in sorted(asked))


def make_scales(run: str = "runs/demo/sft") -> None:
    """assets/scales.png: the report's section on attention for one unseen scene, as Chromium shows it."""
    step = model.find_step(run)
    image = data.render(data.make_scene("test", 0))
    scales = evaluation.draw_scales(model.VLM.from_pretrained(step).eval(), step, image)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "scales.html"
        evaluation.write_report(page, "", [], [], [], {}, [], scales)
        flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
            --disable-background-networking --disable-component-update --hide-scrollbars""".split()
        flags += [f"--user-data-dir={folder}/user", f"--screenshot={model.ASSETS / 'scales.png'}"]
        subprocess.run(["chromium", *flags, "--window-size=1000,950", page.as_uri()], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["tokenizer", "vit", "lm", "probe", "scales"])
    parser.add_argument("--minutes", type=float, default=25, help="how long to train (default 25)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    match args.part:
        case "tokenizer":
            make_tokenizer()
        case "vit":
            make_vit(args.minutes)
        case "lm":
            make_lm(args.minutes)
        case "probe":
            probe()
        case "scales":
            make_scales()
