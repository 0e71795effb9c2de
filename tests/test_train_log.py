"""What a run logs of its speed: tokens, FLOPs, share of the peak, memory, time left; and its trace."""

import json

import pytest
import torch
from helpers import SMALL, TOKENIZER, log_of, small_config

import data
import model
import train_pretrain
from tools import plan

LORA = small_config(lora=model.LoraConfig(4, 4.0))
SPARSE = model.DecoderConfig(TOKENIZER.vocab_size, 64, 4, 2, 2, 32, 256, experts=4)
CASES = {  # model, what trains
    "chain": (small_config(), "connector,decoder"),
    "all trains": (small_config(), "vit,connector,decoder"),
    "connector alone": (small_config(), "connector"),
    "lora": (LORA, "connector,lora"),
    "resampler": (
        small_config(connector=model.ConnectorConfig("resampler", [1, 2], 32, 2)),
        "connector,decoder",
    ),
    "mlp": (small_config(connector=model.ConnectorConfig("mlp", [2], 32, 2)), "connector,decoder"),
    "experts": (small_config(decoder=SPARSE), "connector,decoder"),
}


@pytest.mark.parametrize("mode", ["full", "pruned", "slow"])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_the_plan(name, mode):
    """The plan traces the real modules. It counts all pairs of a document, the log only the causal ones, and
    the log three passes for a connector whose first layer needs no gradient to its inputs.
    """
    (cfg, train), text = CASES[name], 40
    pieces, side = [0, (list(range(1, text + 1)), True)], cfg.vit.image_size
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8).numpy()
    batch = data.make_batch([(pieces, pixels)], [mode], cfg, 256, 4096)
    work = train_pretrain.work_of(batch, cfg, train, train_pretrain.forward_flops(cfg))
    parts = plan.sample_cost(cfg, train.split(","), text, mode, 1)
    assert work["flops"] == pytest.approx(sum(parts.values()), rel=0.12)
    assert work["supervised"] == text
    assert work["tokens"] == text + cfg.visual_tokens("pruned" if mode == "pruned" else "full")


def test_padding_and_other_documents_cost_nothing():
    cfg = small_config()
    pieces = [(list(range(1, 41)), True)]
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8).numpy()
    flops = []
    for samples, length in ((1, 40), (1, 400), (3, 400)):
        batch = data.make_batch([(pieces, none)] * samples, ["full"] * samples, cfg, length, 4096, rows=None)
        work = train_pretrain.work_of(batch, cfg, "connector,decoder", train_pretrain.forward_flops(cfg))
        flops.append(work["flops"])
    assert flops[1] == flops[0] and flops[2] == pytest.approx(3 * flops[0])


def test_peaks_are_those_of_the_card(monkeypatch):
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("Unknown", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert train_pretrain.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert train_pretrain.peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_a_run_logs_its_speed_and_a_trace(tmp_path, small_halves):
    out = tmp_path / "a"
    flags = [*SMALL, *small_halves, "--steps", "4", "--profile", "1", "--out", str(out)]
    train_pretrain.main(flags)
    lines = log_of(out)
    for line in lines:
        assert 0 < line["mfu"] < 2 and line["tflops"] > 0 and line["peak_gb"] > 0.01
        assert line["tokens_per_s"] > line["supervised_per_s"] > line["samples_per_s"] > 0
    left = [line["left"] for line in lines]
    assert left[-1] == 0 and left[0] > 0
    trace = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any("optimizer" in event.get("name", "").lower() for event in trace)
