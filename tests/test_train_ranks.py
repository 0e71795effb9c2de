"""The scripts themselves under torchrun on two CPU processes, and the CUDA paths where there is a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import losses_of, small_batch, small_config

import model
import train_pretrain
import train_sft

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--steps 4 --batch_size 8 --micro_steps 2 --workers 1 --log_every 1 --dtype float32 --clip 1e9".split()
)
PACKED = [*FLAGS, *"--batch_size 0 --rows 8".split()]


def run_script(script: str, ranks: int, flags: list[str]) -> None:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    command = [sys.executable, *torchrun, script, *flags]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)


@pytest.mark.slow
def test_torchrun_gives_the_losses_of_one_process(tmp_path, small_halves):
    """Both stages, packed: scaling, pruned and slow samples, validation. Rows of one kind make
    micro-batches of text alone on one rank.
    """
    for name, ranks in (("one", 1), ("two", 2)):
        a, b = str(tmp_path / name / "a"), str(tmp_path / name / "b")
        run_script("train_pretrain.py", ranks, [*small_halves, *PACKED, "--out", a])
        sft = ["--scale", "32to144", *"--slow_share 0.5 --eval_every 2".split()]
        run_script("train_sft.py", ranks, [*PACKED, *sft, "--init", a, "--out", b])
    for stage in ("a", "b"):
        one, two = losses_of(tmp_path / "one" / stage), losses_of(tmp_path / "two" / stage)
        assert one.keys() == two.keys() == {1, 2, 3, 4}
        for step, loss in one.items():
            assert two[step] == pytest.approx(loss, rel=2e-3), (stage, step)
    assert (tmp_path / "two" / "b" / "best").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["--slow_share 1", "--slow_share 0.5 --mode batch", "--lora.rank 2 --train lora"]
)
def test_two_ranks_where_a_part_is_not_used(flags, tmp_path, small_halves):
    """Without distillation a batch may hold no pruned tokens: then the isolator has no gradient."""
    out = ["--distill_weight", "0", *flags.split(), "--out", str(tmp_path / "run")]
    run_script("train_sft.py", 2, [*small_halves, *FLAGS, *out])
    assert losses_of(tmp_path / "run").keys() == {1, 2, 3, 4}


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
