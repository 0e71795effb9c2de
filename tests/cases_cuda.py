"""Whole steps on a CUDA that is not there, in a process of their own, which test_train_cuda.py starts."""

import dataclasses
import warnings

import pytest
import torch
from helpers import TOKENIZER, graphs, small_config
from helpers_cuda import CUDA, Waits, fake_vlm, pretend, trace_steps
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import data
import model
import prune
import train_sft

pretend()
warnings.simplefilter("ignore")
MIXED = [("chat", "pruned"), ("chat", "slow"), ("text", "pruned")]
DECODER = model.DecoderConfig(TOKENIZER.vocab_size, 32, 2, 2, 1, 16, 64)
LINEAR = model.ConnectorConfig("linear", [2], 32, 2)
SIGLIP = model.ViTConfig(
    image_size=32, width=32, layers=2, heads=2, mlp_width=64, family="siglip", cls_token=False, pre_norm="",
    patch_bias=True,
)  # fmt: skip
ALL = "vit,connector,decoder"
KINDS = [kind for kind in model.CONNECTORS if kind != "chain"]


def pruner_config(name: str) -> model.ModelConfig:
    keep = 4 if name == "coarse" else 0.5
    changes = {"connector": LINEAR} if prune.PRUNERS[name].where in ("patches", "grid") else {}
    return small_config(prune=model.PruneConfig(name, keep, 2), **changes)


def connector_config(kind: str) -> model.ModelConfig:
    levels = [1, 2] if kind in ("chain", "resampler") else [2]
    return small_config(connector=model.ConnectorConfig(kind, levels, 32, 2, tokens=4))


def decoder_config(**changes) -> model.ModelConfig:
    return small_config(decoder=dataclasses.replace(DECODER, **changes))


def unpadded() -> model.ModelConfig:
    cfg = small_config(connector=LINEAR)
    cfg.image.cut = "unpad"
    return cfg


LORA = small_config(lora=model.LoraConfig(4, 4.0))
FROZEN = {"frozen": "bfloat16", "train": "connector,lora"}
CASES = {  # name -> model, samples, flags
    "chain, 4 + 4 tokens": (small_config(), MIXED, {}),
    "text alone": (small_config(), [("text", "pruned")], {}),
    "slow alone": (small_config(), [("chat", "slow")], {}),
    "full alone": (small_config(), [("chat", "full")], {}),
    **{f"pruner {name}": (pruner_config(name), MIXED, {}) for name in prune.PRUNERS},
    **{f"connector {kind}": (connector_config(kind), MIXED, {}) for kind in KINDS},
    "experts": (decoder_config(experts=4), MIXED, {}),
    "experts in bfloat16": (decoder_config(experts=4), MIXED, {"pure_bf16": True}),
    "norms and biases of heads": (decoder_config(qk_norm=True, qkv_bias=True), MIXED, {}),
    "tied head": (decoder_config(tied=True), MIXED, {}),
    "lora": (LORA, MIXED, {"train": "connector,lora"}),
    "lora on a frozen half": (LORA, MIXED, FROZEN),
    "connector alone": (small_config(), MIXED, {"frozen": "bfloat16", "train": "connector"}),
    "all trains": (small_config(), MIXED, {"train": ALL}),
    "muon": (small_config(), MIXED, {"train": ALL, "muon_lr": 0.01}),
    "muon and experts": (decoder_config(experts=4), MIXED, {"muon_lr": 0.01}),
    "bfloat16": (small_config(), MIXED, {"train": ALL, "pure_bf16": True}),
    "bfloat16 and muon": (small_config(), MIXED, {"train": ALL, "pure_bf16": True, "muon_lr": 0.01}),
    "float32": (small_config(), MIXED, {"dtype": "float32"}),
    "z-loss": (small_config(), MIXED, {"z_loss": 1e-4}),
    "temperature": (small_config(), MIXED, {"temperature": 2.0}),
    "unpadded tiles": (unpadded(), MIXED, {}),
    "siglip and prumerge": (
        small_config(vit=SIGLIP, connector=LINEAR, prune=model.PruneConfig("prumerge", 0.5, 2)), MIXED, {},
    ),
}  # fmt: skip


def flags_of(**flags) -> train_sft.SftConfig:
    common = {"compile": "false", "dtype": "bfloat16", "steps": 10, "warmup": 0.1}
    return train_sft.SftConfig(**{**common, **flags})


def batch_of(picks: list[tuple[str, str]], cfg: model.ModelConfig) -> data.Batch:
    """picks: (kind, mode) of each sample."""
    records = [data.Scenes(kind)[100 * (kind == "text") + n] for n, (kind, _) in enumerate(picks)]
    samples = [data.load_sample(data.pieces_of(r, TOKENIZER), r.images, cfg) for r in records]
    return data.make_batch(samples, [mode for _, mode in picks], cfg, 512, 512, rows=[[*range(len(picks))]])


def loss_of(flags: train_sft.SftConfig):
    return train_sft.functools.partial(
        train_sft.fast_slow_loss, temperature=flags.temperature, weight=flags.distill_weight
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_stays_on_its_device(name):
    cfg, picks, changes = CASES[name]
    flags = flags_of(**changes)
    batch = batch_of(picks, cfg)
    trace = trace_steps(model.copy_config(cfg), flags, [batch, batch], "sft", loss_of(flags))
    assert {p.device for p in trace.vlm.parameters()} == {CUDA}
    assert {x.device for x in trace.stats.values() if isinstance(x, torch.Tensor)} == {CUDA}
    assert trace.memory.peak > trace.weights > 0
    assert trace.places == {}  # the host never waits


def test_there_are_enough_cases():
    assert len(CASES) >= 30


class NeverEnding(Waits):
    """A host that asks whether all rows have ended is told that they have not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        return 0 if func._schema.name == "aten::_local_scalar_dense" else out


@pytest.mark.parametrize("view", ["full", "pruned"])
def test_generate_stays_on_its_device_and_waits_every_8_tokens(view, monkeypatch):
    cfg, stops, answers = small_config(), [*range(2, 90)], []
    samples = []
    for n in range(3):
        pieces = data.prompt_pieces("what colour is it?" * (n + 1), 1, TOKENIZER)
        samples.append(data.load_sample(pieces, [data.make_scene("test", n)], cfg))
    batch = data.prompt_batch(samples, view, cfg)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: answers.append(x) or [[5]] * len(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        vlm = fake_vlm(model.copy_config(cfg), flags_of(frozen="bfloat16", train="connector")).eval()
        batch = batch.to(CUDA)
        with NeverEnding() as waits, torch.autocast("cuda", torch.bfloat16):
            vlm.generate(batch, TOKENIZER.end, 20, stops=stops)
    ((place, times),) = waits.places.items()
    assert place[0] == "number" and "ended.all()" in place[1] and times == 2
    (ids,) = answers
    assert (ids.device, ids.shape) == (CUDA, (3, 20))


# --- Compiled: one graph for each kind of block, however many layers, and none after the first steps
DEEP_VIT = model.ViTConfig(image_size=32, width=32, layers=5, heads=2, mlp_width=64)
DEEP = {
    "vit": DEEP_VIT,
    "connector": model.ConnectorConfig(levels=[1, 5], width=32, heads=2, windows=[4, 2], queries=[4, 1]),
    "decoder": dataclasses.replace(DECODER, layers=6),
}
COMPILED = {  # name -> model, flags, kinds of blocks that are compiled
    "frozen encoder": (small_config(**DEEP), {}, 2),
    "all trains": (small_config(**DEEP), {"train": ALL}, 2),
    "experts": (
        small_config(**{**DEEP, "decoder": dataclasses.replace(DECODER, layers=6, experts=4)}), {}, 3,
    ),
    "lora": (small_config(**DEEP, lora=model.LoraConfig(4, 4.0)), FROZEN, 2),
    "connector alone": (small_config(**DEEP), {"frozen": "bfloat16", "train": "connector"}, 2),
}  # fmt: skip
FAST, SLOW, TEXT = [("chat", "pruned")] * 3, [("chat", "slow"), ("chat", "pruned")], [("text", "pruned")] * 2


@pytest.mark.parametrize("name", COMPILED)
def test_a_graph_for_each_kind_of_block(name):
    cfg, changes, kinds = COMPILED[name]
    flags = flags_of(compile="true", **changes)
    batches = [batch_of(picks, cfg) for picks in (FAST, SLOW, TEXT)]
    counts = []
    with graphs() as compiled:
        after = lambda: counts.append(len(compiled))  # noqa: E731
        trace_steps(model.copy_config(cfg), flags, batches * 3, "sft", loss_of(flags), after)
    # Another number of tiles makes one more, of blocks of the encoder, after which that number is free.
    assert counts == [kinds] + [kinds + 1] * 8
