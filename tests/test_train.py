"""The two stages: ranks, accumulation, exact resume, which flags may change, and that the loss falls."""

import json
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import SMALL, Killed, log_of, losses_of, one_step, run_stage, small_batch, small_config

import model
import train_pretrain
import train_sft
from model import UserError


# --- One step, however it is spread over ranks and micro-batches
def test_two_ranks_equal_one_process(tmp_path):
    """Losses and gradients: slow samples or text on one rank only, on both, and no image at all."""
    pruned, slow, text = ("chat", "pruned"), ("chat", "slow"), ("text", "pruned")
    cases = [([slow, pruned], [pruned, pruned]), ([pruned, slow], [text, ("text", "slow")])]
    cases += [([slow], [slow]), ([text], [text])]
    helpers.assert_ranks_equal_one_process(cases, small_config(), tmp_path)


KINDS = [(kind, "full") for kind in ("caption", "text", "interleaved", "chat")] * 2


@pytest.mark.parametrize("picks, sizes", [
    ([("chat", "pruned"), ("chat", "slow"), ("text", "pruned")], (1, 2)),
    (KINDS, (1,) * 8),
])  # fmt: skip
def test_micro_steps_equal_one_batch(picks, sizes):
    cfg, micro, first = small_config(), [], 0
    for size in sizes:
        micro.append(small_batch(picks[first : first + size], cfg, first))
        first += size
    targets = {len(batch.student.targets) for batch in micro}
    assert len(targets) > min(3, len(sizes) - 1)  # a mean of means would differ
    helpers.assert_same_step(one_step(0, 1, [small_batch(picks, cfg)], cfg), one_step(0, 1, micro, cfg))


# --- Going on
@pytest.mark.parametrize("stage", [train_pretrain, train_sft])
def test_resume_is_exact(stage, tmp_path, monkeypatch, small_halves):
    """Four steps, a kill at the seventh, and on from the checkpoint: the same bits as eight in one go.
    Stage 1 draws samples, stage 2 fills rows.
    """
    flags = [*SMALL, *small_halves, *"--steps 8 --save_every 4 --muon_lr 0.01 --micro_steps 2".split()]
    packed = "--batch_size 0 --rows 4 --slow_share 0.5 --train vit,connector,decoder".split()
    flags += packed if stage is train_sft else []
    run_stage(stage, [*flags, "--out", str(tmp_path / "whole")], None, monkeypatch)
    with pytest.raises(Killed):
        run_stage(stage, [*flags, "--out", str(tmp_path / "cut")], 6, monkeypatch)
    assert (tmp_path / "cut" / "latest").read_text().strip() == "step-00000004"
    run_stage(stage, ["--out", str(tmp_path / "cut"), "--resume", "auto", *flags], None, monkeypatch)
    helpers.assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    losses = losses_of(tmp_path / "cut")
    assert losses == losses_of(tmp_path / "whole") and len(losses) == 8


def test_another_rate_on_resume_keeps_the_momenta(tmp_path, monkeypatch, small_halves):
    """The bits of a run whose rate of AdamW changes on the way, of whose optimizers nothing else does."""
    flags = [*SMALL, *small_halves, *"--steps 4 --save_every 2 --lr 1e-3 --muon_lr 0.01".split()]
    with pytest.raises(Killed):
        run_stage(train_pretrain, [*flags, "--out", str(tmp_path / "cut")], 3, monkeypatch)
    train_pretrain.main([*flags, "--out", str(tmp_path / "cut"), "--resume", "auto", "--lr", "3e-3"])
    real = train_pretrain.optimizer_step

    def step_at_another_rate(run, ddp, micro, optimizers, step, loss_of):
        for group in optimizers[0].param_groups if step == 2 else ():
            assert group["peak"] == 1e-3
            group["peak"] = 3e-3
        return real(run, ddp, micro, optimizers, step, loss_of)

    monkeypatch.setattr(train_pretrain, "optimizer_step", step_at_another_rate)
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    helpers.assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_the_log_is_cut_behind_the_checkpoint(tmp_path, monkeypatch, small_halves):
    flags = [*SMALL, *small_halves, *"--steps 4 --save_every 2".split(), "--out", str(tmp_path)]
    with pytest.raises(Killed):
        run_stage(train_pretrain, flags, 3, monkeypatch)
    log = tmp_path / "metrics.jsonl"
    lines = [*log_of(tmp_path), {"step": 2, "val_loss": 0.5}, {"step": 4, "val_loss": 0.1}]
    assert [line["step"] for line in lines] == [1, 2, 3, 2, 4]
    lines[1]["skipped"] = 3  # lines of validation do not say
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [*flags, "--resume", "auto"]
    run, vlm, _, cfg = train_pretrain.start("pretrain", train_pretrain.PretrainConfig, argv, "")
    assert log_of(tmp_path) == lines  # nothing is written before all checks have passed
    assert train_pretrain.begin(run, vlm, train_pretrain.make_optimizers(vlm, cfg)) == 2
    assert log_of(tmp_path) == [lines[0], lines[1], lines[3]]
    assert (run.best, run.skipped.total()) == (0.5, 3)


def test_resume_keeps_the_best_and_refuses_another_stage(tmp_path, small_halves):
    flags = [*SMALL, *small_halves, "--muon_lr", "0", "--out", str(tmp_path / "a")]
    train_pretrain.main([*flags, *"--steps 4 --eval_every 2".split()])
    weights = helpers.weights_of(tmp_path / "a")
    train_pretrain.main([*flags, *"--resume auto --steps 6 --lr 0 --eval_every 2".split()])
    after = helpers.weights_of(tmp_path / "a")
    assert all(torch.equal(weights[name], after[name]) for name in weights)  # a rate of 0 changes nothing
    assert (tmp_path / "a" / (tmp_path / "a" / "best").read_text().strip()).is_dir()
    config = (tmp_path / "a" / "config.json").read_text()
    with pytest.raises(UserError, match="holds a run of stage pretrain"):
        train_sft.main([*SMALL, "--out", str(tmp_path / "a"), "--resume", "auto"])
    assert (tmp_path / "a" / "config.json").read_text() == config  # nothing was overwritten


# --- What may change
@pytest.fixture(scope="module")
def begun(tmp_path_factory, small_halves) -> str:
    folder = tmp_path_factory.mktemp("begun") / "a"
    train_pretrain.main([*SMALL, *small_halves, "--steps", "1", "--out", str(folder)])
    return str(folder)


RUN_FLAGS = {"steps": 9, "val_data": "scenes", "lr": 0.5, "dtype": "auto", "frozen": "bfloat16"}
DATA_AND_OPTIMIZERS = {"seed": 3, "rows": 32, "data": "caption.json", "train": "connector", "pruner": "grid"}
PRUNING = {"prune.keep": 0.3, "prune.isolator": 7, "prune.name": "grid", "lora.rank": 2, "lora.alpha": 3.0}
EXPERTS = {"decoder.experts": 4}
GEOMETRY = {"vit.width": 48, "image.resample": 2, "decoder.layers": 3}
CONNECTOR = {"connector.kind": "linear", "connector.windows": "4,2", "connector.levels": "1,2"}
SCALE, NEITHER = {"scale": "32to144"}, {"preset": "tiny-moe", "decoder_from": ""}
HALVES = {"vit.image_size": 128, "vit.align_corners": "true"}


ACCEPTED = {
    "resume": [RUN_FLAGS], "init": [RUN_FLAGS, DATA_AND_OPTIMIZERS, PRUNING, EXPERTS, SCALE],
    "preset": [RUN_FLAGS, DATA_AND_OPTIMIZERS, PRUNING, EXPERTS, CONNECTOR, HALVES],
    "preset, at random": [GEOMETRY, CONNECTOR, HALVES, PRUNING, EXPERTS],
}  # fmt: skip
REFUSED = {
    "resume": [DATA_AND_OPTIMIZERS, PRUNING, EXPERTS, CONNECTOR, HALVES, GEOMETRY, NEITHER, SCALE],
    "init": [CONNECTOR, HALVES, GEOMETRY, NEITHER], "preset": [GEOMETRY],
}  # fmt: skip


@pytest.mark.parametrize("origin", ACCEPTED)
def test_what_may_change(origin, begun, small_halves, tmp_path):
    """When a run goes on, when one starts from another, when halves are loaded, and when none is."""
    words = {
        "resume": [*SMALL, "--out", begun, "--resume", "auto", "--init", begun],
        "init": ["--init", begun, "--out", str(tmp_path)],
        "preset": [*small_halves, "--out", str(tmp_path)],
        "preset, at random": ["--out", str(tmp_path), "--encoder_from=", "--decoder_from="],
    }[origin]

    def resolve(flag: str, value) -> tuple:
        argv = [*words, f"--{flag}={value}"]
        return train_pretrain.resolve_flags(train_pretrain.PretrainConfig, "pretrain", argv, "")

    for group in ACCEPTED[origin]:
        for flag, value in group.items():
            resolved = resolve(flag, value)
            assert origin.startswith(resolved[3]) and (resolved[2] is None) == (resolved[3] == "preset")
    for group in REFUSED.get(origin, []):
        for flag, value in group.items():
            with pytest.raises(UserError, match=f"--{flag} cannot change: .* has its own"):
                resolve(flag, value)


@pytest.mark.parametrize("flags, world, fix", [
    ({"rows": 32, "micro_steps": 8}, 8, "--rows 32 is .* 8 micro-steps x 8 ranks: .* 1 or 2 or 4$"),
    ({"batch_size": 6, "micro_steps": 4}, 1, "--batch_size 6 is .* take --micro_steps 1 or 2 or 3 or 6$"),
    ({"rows": 12}, 8, "--rows 12 is .* 1 micro-steps x 8 ranks: take a multiple of 8$"),
])  # fmt: skip
def test_a_step_that_does_not_divide_names_what_does(flags, world, fix):
    with pytest.raises(UserError, match=fix):
        train_pretrain.resolve_device(train_pretrain.RunConfig(**flags), torch.device("cpu"), world)


# --- Whole runs
def test_training_lowers_the_loss_end_to_end(tmp_path, small_halves, capsys):
    """Both stages with scaling between them, from random halves: the loss falls by a third."""
    flags = [*SMALL, "--lr", "3e-3", "--log_every", "5"]
    train_pretrain.main([*flags, *small_halves, "--steps", "60", "--out", str(tmp_path / "a")])
    losses = losses_of(tmp_path / "a")
    assert losses[60] < 0.66 * losses[5]
    capsys.readouterr()
    sft = [*flags, "--init", str(tmp_path / "a"), "--scale", "32to144", "--steps", "20", "--eval_every", "20"]
    train_sft.main([*sft, "--out", str(tmp_path / "b"), "--later", "99"])
    vlm = model.VLM.from_pretrained(tmp_path / "b")
    assert vlm.cfg.visual_tokens() == 144 and vlm.cfg.side == 16
    assert (tmp_path / "b" / "best").read_text() == (tmp_path / "b" / "latest").read_text()
    assert np.isfinite([*losses_of(tmp_path / "b").values()]).all()
    output = capsys.readouterr()
    assert "whole chain left=" in output.err
    lines = output.out.splitlines()
    parameters = sum(p.numel() for p in vlm.parameters()) / 1e6
    start = f"model   {model.find_step(tmp_path / 'a')}: {parameters:,.2f}M parameters"
    assert lines[0].startswith(start) and lines[0].endswith("144 tokens for a picture of 128 px")
    assert lines[1].startswith("data    scenes") and lines[1].endswith("; a step takes 8 samples")
    assert lines[2].startswith("run     20 steps, rate 0.003, float32 (the ")
    assert " here), 1 x cpu (" in lines[2]


def test_a_crowded_machine_is_reported_once(monkeypatch, capsys):
    run, clock = helpers.small_run(), iter([0.0, 3.8, 5.0, 6.2])
    monkeypatch.setattr(train_pretrain.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    reports = []
    for _ in range(4):  # two threads could use 4 seconds in each interval of 2
        run.warn_if_crowded(2.0)
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1] == reports[3] == ""
    assert "2 threads had 30% of their cores' time" in reports[2] and "OMP_NUM_THREADS=1 " in reports[2]


@pytest.mark.slow
def test_compiled_blocks_have_no_graph_break(tmp_path, small_halves):
    """--compile true uses fullgraph=True, which raises on a break or on too many recompilations: training in
    both modes with a changing number of rows, validation, and generation between steps.
    """
    flags = [*SMALL, *small_halves, *"--compile true --steps 4 --slow_share 0.3 --eval_every 2".split()]
    train_sft.main([*flags, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "best").is_file()


# --- The scripts themselves under torchrun on two CPU processes, and the CUDA paths where there is a GPU
ROOT = Path(__file__).parent.parent
RANK_FLAGS = "--steps 4 --batch_size 8 --micro_steps 2 --workers 1 --log_every 1".split()
RANK_FLAGS += "--dtype float32 --clip 1e9".split()
PACKED_RANKS = [*RANK_FLAGS, *"--batch_size 0 --rows 8".split()]


def run_script(script: str, ranks: int, flags: list[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else ()), script, *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_torchrun_gives_the_losses_of_one_process(tmp_path, small_halves):
    """Both stages, packed: scaling, pruned and slow samples, validation. Rows of one kind make
    micro-batches of text alone on one rank.
    """
    for name, ranks in (("one", 1), ("two", 2)):
        a, b = str(tmp_path / name / "a"), str(tmp_path / name / "b")
        run_script("train_pretrain.py", ranks, [*small_halves, *PACKED_RANKS, "--out", a])
        sft = ["--scale", "32to144", *"--slow_share 0.5 --eval_every 2".split()]
        run_script("train_sft.py", ranks, [*PACKED_RANKS, *sft, "--init", a, "--out", b])
    for stage in ("a", "b"):
        one, two = losses_of(tmp_path / "one" / stage), losses_of(tmp_path / "two" / stage)
        assert one.keys() == two.keys() == {1, 2, 3, 4}
        for step, loss in one.items():
            assert two[step] == pytest.approx(loss, rel=2e-3), (stage, step)
    assert (tmp_path / "two" / "b" / "best").is_file()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
def test_cuda_gives_the_gradients_of_the_cpu():
    torch.backends.cudnn.allow_tf32 = False  # the patch convolution
    picks = [("chat", "pruned"), ("chat", "slow"), ("text", "pruned")]
    grads = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        vlm = model.VLM(small_config()).to(device)
        vlm.set_trainable(["vit", "connector", "decoder"], isolator=True)
        batch = small_batch(picks, vlm.cfg).to(torch.device(device))
        logits, teacher, _ = vlm(batch)
        train_sft.fast_slow_loss(logits, teacher, batch)["loss"].backward()
        grads[device] = {name: p.grad.cpu() for name, p in vlm.named_parameters() if p.grad is not None}
    assert grads["cpu"].keys() == grads["cuda"].keys()
    for name, gradient in grads["cpu"].items():
        torch.testing.assert_close(grads["cuda"][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
def test_both_stages_run_compiled_in_bfloat16_on_cuda(tmp_path, small_halves):
    flags = "--steps 3 --rows 8 --device cuda --dtype bfloat16 --compile true".split()
    train_pretrain.main([*flags, *small_halves, "--out", str(tmp_path / "a")])
    sft = ["--init", str(tmp_path / "a"), *"--scale 32to144 --slow_share 0.5".split()]
    train_sft.main([*flags, *sft, "--out", str(tmp_path / "b")])
    assert (tmp_path / "b" / "latest").is_file()


@pytest.mark.slow
def test_ranks_with_whole_weights_compile_the_graphs_of_one_process(tmp_path):
    """DDP's own optimizer would cut blocks of this width into pieces."""
    flags, counts = {"compile": "true", "train": "vit,connector,decoder"}, []
    cfg = small_config(decoder=model.DecoderConfig(helpers.TOKENIZER.vocab_size, 512, 2, 8, 8, 64, 1536))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    for world in (1, 2):  # of two, one is here: what it compiles does not depend on the other
        vlm = model.VLM(cfg)
        run = helpers.small_run(0, world, **flags)
        train_pretrain.freeze(vlm, run.cfg)
        optimizers = train_pretrain.make_optimizers(vlm, run.cfg)
        with helpers.graphs() as compiled:
            net = train_pretrain.prepare(run, vlm)
            for picks in ([("chat", "pruned"), ("chat", "slow")], [("text", "pruned")]):
                micro = [small_batch(picks, cfg)]
                train_pretrain.optimizer_step(run, net, micro, optimizers, 0, train_sft.fast_slow_loss)
        counts.append(len(compiled))
    torch.distributed.destroy_process_group()
    assert type(net).__name__ == "DistributedDataParallel" and counts[0] == counts[1] > 0


# --- Losses and gradients that are not finite
def run_with_nan(steps: set[int], argv: list[str], monkeypatch) -> None:
    """Stage 1, whose loss is NaN in those steps."""
    real, calls = train_pretrain.caption_loss, iter(range(10**6))

    def loss_of(logits, teacher, batch):
        losses = real(logits, teacher, batch)
        return {"loss": losses["loss"] * (float("nan") if next(calls) in steps else 1.0)}

    monkeypatch.setattr(train_pretrain, "caption_loss", loss_of)
    train_pretrain.main(argv)


NAN = [*SMALL, *"--steps 12 --save_every 2 --muon_lr 0.01 --warmup 0 --weight_decay 0.1".split()]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, small_halves, monkeypatch):
    flags = [*NAN, *small_halves, "--steps", "4", "--save_every", "1", "--final_lr", "1", "--out"]
    run_with_nan({2}, [*flags, f"{tmp_path}/nan"], monkeypatch)
    lines = [json.loads(line) for line in (tmp_path / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [("loss" in line, line.get("skipped", 0)) for line in lines] == [
        (True, 0),
        (True, 0),
        (False, 1),
        (True, 1),
    ]
    (note,) = (tmp_path / "nan" / "not_finite-0.jsonl").read_text().splitlines()
    note = json.loads(note)
    assert note["step"] == 3 and len(note["records"]) == 8 and all(note["records"])
    weights = [value.isfinite().all() for value in helpers.weights_of(tmp_path / "nan").values()]
    assert all(weights)


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_weights_and_moments_stay_the_same_bits(muon_lr):
    torch.manual_seed(0)
    vlm, cfg = model.VLM(small_config()), train_pretrain.RunConfig(muon_lr=muon_lr, weight_decay=0.1)
    vlm.set_trainable(["connector", "decoder"], isolator=True)
    optimizers, weights = train_pretrain.make_optimizers(vlm, cfg), []
    for grad in (0.1, float("nan"), 0.1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"]
                for p in group["params"]:
                    p.grad = torch.full_like(p, grad)
            optimizer.found_inf = torch.tensor(float(grad != grad))
            optimizer.step()
        tensors = {**vlm.state_dict(), **train_pretrain.moments_of(vlm, optimizers)}
        weights.append({name: value.clone() for name, value in tensors.items()})
    first, skipped, last = weights
    assert all(torch.equal(first[name], skipped[name]) for name in first)
    assert not torch.equal(skipped["decoder.embed_tokens.weight"], last["decoder.embed_tokens.weight"])


def test_ten_steps_in_a_row_end_the_run_and_the_checkpoint_stays(tmp_path, small_halves, monkeypatch):
    with pytest.raises(
        UserError, match="no gradient was finite in ten steps up to 12: --lr may be too large"
    ):
        run_with_nan({*range(2, 12)}, [*NAN, *small_halves, "--out", str(tmp_path / "a")], monkeypatch)
    step = model.find_step(tmp_path / "a")
    assert step.name == "step-00000010"  # its weights are those of the second step
    assert all(value.isfinite().all() for value in helpers.weights_of(tmp_path / "a").values())
    assert len((tmp_path / "a" / "not_finite-0.jsonl").read_text().splitlines()) == 10
