"""Helpers that several test files share: small models, runs that stop, files of records and pictures."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import model
import train_pretrain

TOKENIZER = data.Tokenizer.from_pretrained(model.ASSETS / "scenes.tiktoken")
SMALL = "--batch_size 8 --row_length 128 --workers 0 --log_every 1 --dtype float32 --device cpu".split()


def small_config(**changes) -> model.ModelConfig:
    cfg = model.ModelConfig(
        vit=model.ViTConfig(image_size=32, width=32, layers=2, heads=2, mlp_width=64),
        decoder=model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 64),
        connector=model.ConnectorConfig(levels=[1, 2], width=32, heads=2, windows=[4, 2], queries=[4, 1]),
        prune=model.PruneConfig(keep=0.5, isolator=2),
    )
    return model.dataclasses.replace(cfg, **changes)


def tiny_vlm(tied: bool = False, seed: int = 0, context: int = 2048) -> model.VLM:
    """4x4 patches, 4 + 4 visual tokens of which the fast mode keeps 3; weights so large that outputs vary."""
    torch.manual_seed(seed)
    vlm = model.VLM(model.ModelConfig(
        vit=model.ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
        connector=model.ConnectorConfig("chain", [1, 2], 16, 2, windows=[4, 2], queries=[4, 1]),
        decoder=model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 4, 2, 8, 48, tied=tied, context=context),
        prune=model.PruneConfig(keep=3, isolator=2),
    ))  # fmt: skip
    for p in vlm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vlm.eval()


def samples_of(records: list[data.Record], cfg: model.ModelConfig) -> list[tuple]:
    return [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, cfg, r.name)) for r in records]


def small_plan(sources: list[tuple] | str, steps=range(4), cfg=None, choose_mode=None, **fields) -> data.Plan:
    """A plan over (source, weight) pairs or a file; fields: those of RowConfig and of Plan."""
    if isinstance(sources, str | Path):
        sources = data.open_sources(str(sources), fields.pop("stage", "sft"))
    names = {field.name for field in data.dataclasses.fields(data.RowConfig)}
    rows = data.RowConfig(**{name: value for name, value in fields.items() if name in names})
    more = {name: value for name, value in fields.items() if name not in names}
    mode = choose_mode or (lambda number: "full")
    tokenizer = more.pop("tokenizer", TOKENIZER)
    return data.Plan(sources, tokenizer, cfg or small_config(), rows, mode, steps, **more)


def draw(plan: data.Plan) -> list[data.Batch]:
    return [data.Stream(plan)[planned] for planned in plan]


# --- Runs
class Killed(Exception):
    pass


def run_stage(stage, argv: list[str], stop: int | None, monkeypatch) -> None:
    """Run a stage; with `stop` it dies before step `stop`."""
    real = train_pretrain.optimizer_step

    def step(run, ddp, micro, optimizers, number, loss_of):
        if number == stop:
            raise Killed
        return real(run, ddp, micro, optimizers, number, loss_of)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "optimizer_step", step)
        stage.main(argv)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# --- Files of records and pictures
def turns(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def chat(image: str | list | None, question: str = "<image>\nWhat?", answer: str = "Red.") -> dict:
    return ({"image": image} if image else {}) | {"conversations": turns(question, answer)}


def picture(colour: str = "red", form: str = "PNG", size: tuple[int, int] = (20, 20), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **options)
    return buffer.getvalue()


def half_jpeg() -> bytes:
    """Its header is whole, half of its pixels are missing."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def colour_of(image) -> tuple[int, int, int]:
    return data.open_image(image).getpixel((5, 5))


def write(path: Path, content: bytes | str | list) -> Path:
    """Bytes, a text, or records as JSON or JSON lines, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(record) + "\n" for record in content)
    elif isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def broken_set(folder: Path, n: int = 200) -> Path:
    """LLaVA's list: of 20 records one lacks its picture, one has half, one is malformed, four are text."""
    full, records = picture("red", "JPEG", (64, 48)), []
    for i in range(n):
        name = f"{'gone' if i % 20 == 3 else 'images'}/{i}.jpg"
        if i % 20 != 3:
            write(folder / name, half_jpeg() if i % 20 == 7 else full)
        record = chat(name, "<image>\nWhat is it?", f"It is number {i}.")
        record = chat(None, "What now?", f"Text {i}.") if i % 5 == 0 else record
        records.append(chat("a.png", "no mark") if i % 20 == 11 else record)
    return write(folder / "train.json", records)
