"""Helpers that several test files share: small models, runs that stop, files of records and pictures."""

import dataclasses
import io
import json
import os
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file

import data
import model
import train_pretrain
import train_sft

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


def enlarge(vlm: model.VLM) -> model.VLM:
    """With matrices so large that outputs vary."""
    for p in vlm.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return vlm


def tiny_vlm(tied: bool = False, seed: int = 0, context: int = 2048) -> model.VLM:
    """4x4 patches, 4 + 4 visual tokens of which the fast mode keeps 3."""
    torch.manual_seed(seed)
    return enlarge(model.VLM(model.ModelConfig(
        vit=model.ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
        connector=model.ConnectorConfig("chain", [1, 2], 16, 2, windows=[4, 2], queries=[4, 1]),
        decoder=model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 4, 2, 8, 48, tied=tied, context=context),
        prune=model.PruneConfig(keep=3, isolator=2),
    ))).eval()  # fmt: skip


def all_tokens(vlm: model.VLM, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (I, 3, size, size) -> every visual token of each tile (I, V, D)."""
    return vlm.connector(vlm.levels(vlm.states(pixels)))


def slot_mask(rows: data.Rows) -> torch.Tensor:
    """(B, T), True where a visual token goes."""
    empty = torch.zeros(rows.ids.numel(), dtype=torch.bool)
    return empty.index_fill(0, rows.slots, True).view_as(rows.ids)


def samples_of(records: list[data.Record], cfg: model.ModelConfig) -> list[tuple]:
    return [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, cfg, r.name)) for r in records]


def small_plan(sources: list[tuple] | str, steps=range(4), cfg=None, choose_mode=None, **fields) -> data.Plan:
    """A plan over (source, weight) pairs or a file; fields: those of RowConfig and of Plan."""
    if isinstance(sources, str | Path):
        sources = data.open_sources(str(sources), fields.pop("stage", "sft"))
    names = {field.name for field in dataclasses.fields(data.RowConfig)}
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


def losses_of(folder: Path) -> dict[int, float]:
    """Step -> loss; every step is logged once."""
    lines = [line for line in log_of(folder) if "loss" in line]
    losses = {line["step"]: line["loss"] for line in lines}
    assert len(losses) == len(lines)
    return losses


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(model.find_step(run) / "model.safetensors")


def assert_same_weights(run: Path, expected: Path) -> None:
    weights = weights_of(run)
    assert all(torch.equal(weights[name], value) for name, value in weights_of(expected).items())


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


# --- Steps
def small_batch(picks: list[tuple[str, str]], cfg: model.ModelConfig, start: int = 0, **more) -> data.Batch:
    """picks: (kind, mode) of each sample; number n, counted from `start`, is always the same record."""
    records = [data.Scenes(kind)[int(kind == "text") * 100 + n] for n, (kind, _) in enumerate(picks, start)]
    return data.make_batch(samples_of(records, cfg), [mode for _, mode in picks], cfg, 128, 512, **more)


def small_run(rank: int = 0, world: int = 1, **flags) -> train_pretrain.Run:
    """A run on the CPU that is never written."""
    flags = {"compile": "false", "dtype": "float32", **flags}
    return train_pretrain.Run("sft", train_pretrain.RunConfig(**flags), rank, world, torch.device("cpu"))


def one_step(rank: int, world: int, micro: list[data.Batch], cfg: model.ModelConfig) -> tuple[dict, dict]:
    """A plain SGD step, whose change is the gradient: new weights and the logged numbers."""
    torch.manual_seed(0)
    vlm = model.VLM(cfg)
    vlm.set_trainable(["vit", "connector", "decoder"], isolator=True)
    run = small_run(rank, world, clip=1e9, warmup=0, steps=10)
    trained = [{"params": [p for p in vlm.parameters() if p.requires_grad], "peak": 1.0}]
    optimizers, ddp = [torch.optim.SGD(trained, lr=1.0, fused=True)], train_pretrain.prepare(run, vlm)
    stats = train_pretrain.optimizer_step(run, ddp, micro, optimizers, 0, train_sft.fast_slow_loss)
    return vlm.state_dict(), {name: float(value) for name, value in stats.items()}


@contextmanager
def graphs():
    """Those that are compiled meanwhile; to save time they are run as they are."""
    from torch._dynamo.backends.debugging import aot_eager

    compiled, compile_block = [], torch.nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    def compile_whole(block, fullgraph):
        assert fullgraph  # a graph that breaks is an error
        compile_block(block, fullgraph=True, backend=backend)

    torch._dynamo.reset()
    torch.nn.Module.compile = compile_whole
    try:
        yield compiled
    finally:
        torch.nn.Module.compile = compile_block


def assert_same_step(a: tuple[dict, dict], b: tuple[dict, dict]) -> None:
    """Of two results of one_step."""
    for name, value in a[1].items():
        assert b[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, weight in a[0].items():
        torch.testing.assert_close(b[0][name], weight, rtol=1e-4, atol=2e-6, msg=name)


def on_two_ranks(function, folder: Path, *arguments) -> list:
    return on_ranks(2, function, folder, *arguments)


def on_ranks(world: int, function, folder: Path, *arguments) -> list:
    """What function(rank, *arguments) returns in each of `world` processes that talk over gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(run_rank, (world, function, str(folder), arguments), nprocs=world)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def run_rank(rank: int, world: int, function, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    if torch.distributed.is_initialized():  # a whole run has ended it
        torch.distributed.destroy_process_group()


def steps_of_rank(
    rank: int, cases: list[tuple[list, list]], cfg: model.ModelConfig
) -> list[tuple[dict, dict]]:
    """one_step of a rank, which holds the samples case[rank]; numbers go on from rank to rank."""
    starts = [rank * len(case[0]) for case in cases]
    batches = [small_batch(case[rank], cfg, start) for case, start in zip(cases, starts)]
    return [one_step(rank, 2, [batch], cfg) for batch in batches]


def assert_ranks_equal_one_process(cases: list[tuple[list, list]], cfg, folder: Path) -> None:
    for case, two in zip(cases, on_two_ranks(steps_of_rank, folder, cases, cfg)[0]):
        assert_same_step(one_step(0, 1, [small_batch([*case[0], *case[1]], cfg)], cfg), two)
