"""Pruning against vectors of DualSpeed's own code, and by its own contracts."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import prune

VECTORS = load_file(Path(__file__).parent / "fixtures" / "pruning.safetensors")
SEEDS, KINDS, KEEPS = ("s0", "s1", "s2"), ("gauss", "cluster", "dup"), (14, 36)


def features(images: int = 3, tokens: int = 30, width: int = 8) -> torch.Tensor:
    return torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(0))


# --- DivPrune against the vectors
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_divprune_equals_dualspeeds(kind, keep):
    """Three images in a batch, and each alone."""
    names = [f"{seed}.divprune.{kind}" for seed in SEEDS]
    batch = torch.stack([VECTORS[f"{name}.features"] for name in names])  # (3, 144, 24)
    expected = [VECTORS[f"{name}.keep{keep}.idx"].tolist() for name in names]
    assert prune.select("divprune", batch, keep).tolist() == expected
    assert [prune.select("divprune", image[None], keep)[0].tolist() for image in batch] == expected


def test_divprune_looks_at_directions_in_fp32():
    x = features()
    kept = prune.select("divprune", x, 7)
    assert torch.equal(kept, prune.select("divprune", 4.0 * x, 7))
    assert not torch.equal(kept, prune.select("divprune", x.flip(0), 7))  # but not their direction
    low = features(3, 144, 24).bfloat16()
    assert torch.equal(prune.select("divprune", low, 14), prune.select("divprune", low.float(), 14))
    # Three directions, each four times: the first of each kind, then the lowest of what is left.
    x = torch.eye(4)[[2, 0, 2, 1, 0, 1, 2, 0, 1, 2, 0, 1]][None]  # (1, 12, 4)
    assert prune.select("divprune", x, 3).tolist() == [[0, 1, 3]]
    assert prune.select("divprune", x, 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("value", [0.0, 1.0])  # exact in fp32 at a width of 16: all distances are equal
def test_ties_go_to_the_lowest_index(value):
    kept = prune.select("divprune", torch.full((2, 20, 16), value), 7)
    assert kept.tolist() == [list(range(7))] * 2


def test_grid_takes_the_centres_of_cells():
    assert prune.select("grid", features(2, 36), 4, grid=6).tolist() == [[7, 10, 25, 28]] * 2
    strided = prune.select("grid", features(1, 32), 4, grid=0)  # no grid
    assert strided.tolist() == [[4, 12, 20, 28]]


@pytest.mark.parametrize("tokens, keep, expected", [
    (576, 0.1, 58), (576, 57, 57), (576, 1.0, 576), (80, 0.25, 20), (10, 0.01, 1), (16, 40, 16), (16, 2, 2),
])  # fmt: skip
def test_kept_tokens(tokens, keep, expected):
    assert prune.kept_tokens("divprune", keep, tokens) == expected


# --- Mode isolator and mode
def test_isolator_comes_before_the_kept_tokens():
    torch.manual_seed(0)
    isolator = prune.ModeIsolator(4, 64)
    bound = 1 / math.sqrt(64)
    assert isolator.weight.shape == (4, 64)
    assert -bound <= isolator.weight.min() < -0.9 * bound and 0.9 * bound < isolator.weight.max() <= bound
    kept = features(3, 5, 64)
    out = isolator(kept)
    assert out.shape == (3, 9, 64)
    assert torch.equal(out[:, 4:], kept) and torch.equal(out[1, :4], isolator.weight)
    out.sum().backward()
    assert torch.equal(isolator.weight.grad, torch.full((4, 64), 3.0))  # one copy an image
    assert isolator(kept.bfloat16()).dtype == torch.bfloat16


def draws(seed: int, share: float, n: int = 20_000) -> list[bool]:
    return [prune.draw_mode(seed, number, share) == "slow" for number in range(n)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_of_slow_samples(share):
    assert abs(sum(draws(0, share)) / 20_000 - share) <= 3 * math.sqrt(share * (1 - share) / 20_000)


def test_draws_are_pure_and_depend_on_the_seed():
    first = draws(0, 0.1, 2000)
    torch.manual_seed(7)
    assert draws(0, 0.1, 2000) == first
    assert [n for n in range(60) if first[n]] == [24, 30, 44, 52, 59]  # on every machine and rank
    both = sum(a and b for a, b in zip(first, draws(1, 0.1, 2000)))
    assert both < 40  # independent seeds agree on about 20 of 200 slow samples


# --- Self-distillation
def kl_fp64(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * mean over rows of sum p_teacher * log(p_teacher / p_student), written out."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_distillation_loss_equals_dualspeeds(seed, temperature):
    student, teacher = VECTORS[f"{seed}.kd.student_logits"], VECTORS[f"{seed}.kd.teacher_logits"]
    expected = VECTORS[f"{seed}.kd.T{temperature}.loss"].item()
    assert prune.distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)
    for chunk in (1, 4, 11):
        total = prune.distillation_sum(student, teacher, temperature, chunk).item()
        assert total / 11 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("chunk", [4, 2048])
@pytest.mark.parametrize("temperature", [1, 2])
def test_distillation_gradient(temperature, chunk):
    student = VECTORS["s0.kd.student_logits"].clone().requires_grad_()
    teacher = VECTORS["s0.kd.teacher_logits"].clone().requires_grad_()
    (prune.distillation_sum(student, teacher, temperature, chunk) / 11).backward()
    reference = student.detach().double().requires_grad_()
    kl_fp64(reference, teacher.detach(), temperature).backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=0, atol=1e-7)
    assert teacher.grad is None  # the teacher does not learn


def test_distillation_in_bf16_is_computed_in_fp32_and_equal_logits_cost_nothing():
    student, teacher = (VECTORS[f"s1.kd.{who}_logits"].bfloat16() for who in ("student", "teacher"))
    expected = kl_fp64(student, teacher, 1).item()
    assert prune.distillation_loss(student, teacher).item() == pytest.approx(expected, abs=1e-5)
    logits = VECTORS["s0.kd.teacher_logits"]
    assert abs(prune.distillation_loss(logits, logits, 2.0).item()) < 1e-6
    shifted = logits + F.one_hot(torch.tensor([3]), 37)
    assert prune.distillation_loss(shifted, logits, 2.0).item() > 1e-3
