"""Pruning against vectors of DualSpeed's own code, and by its own contracts."""

import math
from pathlib import Path

import numpy as np
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


# --- Every pruner against official vectors or a plain fp64 loop over one image, and by what all promise
MERGING = [name for name, pruner in prune.PRUNERS.items() if pruner.merges]
SELECTING = [name for name in prune.PRUNERS if name not in MERGING]


def inputs(images: int = 3, grid: int = 6, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Features and all that any pruner needs, for a CLIP-like encoder; two of five words are padding."""
    g = torch.Generator().manual_seed(seed)
    tokens = grid * grid
    needs = {
        "seeds": torch.arange(images) + 1000 * seed, "grid": grid,
        "cls": torch.randn(images, 1, width, generator=g),
        "cls_attention": torch.randn(images, tokens, generator=g).softmax(1),
        "keys": torch.randn(images, 2, tokens, 4, generator=g),
        "text": torch.randn(images, 5, width, generator=g) * torch.tensor([1.0, 1, 1, 0, 0])[:, None],
    }  # fmt: skip
    return torch.randn(images, tokens, width, generator=g), needs


def convert(needs: dict, change) -> dict:
    return {name: change(x) if torch.is_tensor(x) else x for name, x in needs.items()}


def fp64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def valid(kept: torch.Tensor, keep: int, tokens: int = 36) -> bool:
    """Sorted, unique, in range"""
    right = kept.shape[1] == keep and kept.dtype == torch.int64 and not kept.requires_grad
    return right and bool((kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < tokens)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


# --- The official codes
@pytest.mark.parametrize("seed", SEEDS)
def test_official_selections(seed):
    given = {name: x[None] for name, x in VECTORS.items() if name.startswith(seed)}
    text, embeds = given[f"{seed}.cdpruner.text_embeds"], given[f"{seed}.cdpruner.patch_embeds"]
    kept = prune.select("cdpruner", given[f"{seed}.cdpruner.features"], 20, text=text, patch_embeds=embeds)
    assert torch.equal(kept, given[f"{seed}.cdpruner.keep20.idx"])
    features = given[f"{seed}.vispruner.features"]
    attention = given[f"{seed}.vispruner.cls_attn_heads"].mean(1)
    for name in ("vispruner", "fastervlm"):
        kept = prune.select(name, features, 24, cls_attention=attention)
        assert torch.equal(kept, given[f"{seed}.{name}.keep24.idx"])


@pytest.mark.parametrize("seed", SEEDS)
def test_official_visionzip(seed):
    names = ("hidden", "cls_attn_heads", "keys_mean_heads", "d17c6.tokens")
    hidden, heads, keys, expected = (VECTORS[f"{seed}.visionzip.{name}"] for name in names)
    needs = {"cls_attention": heads[:, 1:].mean(0)[None], "keys": keys[None, None, 1:], "contextual": 6}
    tokens = prune.reduce("visionzip", hidden[None, 1:], 24, cls=hidden[None, :1], **needs)
    torch.testing.assert_close(tokens[0], expected, rtol=0, atol=1e-5)
    without = prune.reduce("visionzip", hidden[None, 1:], 23, cls=None, **needs)  # an encoder without CLS
    torch.testing.assert_close(without[0], expected[1:], rtol=0, atol=1e-5)


# --- Plain loops over one image
def naive_relevance(patches: np.ndarray, words: np.ndarray, best) -> np.ndarray:
    x = np.array([best([cosine(p, w) for w in words]) for p in patches])
    return (x - x.min() + 1e-6) / (x.max() - x.min())


def naive_dpp(features: np.ndarray, relevance: np.ndarray, keep: int) -> list[int]:
    """Greedy: the token with which the determinant of the chosen ones is largest."""
    similarity = np.array([[cosine(a, b) for b in features] for a in features])
    kernel, kept = torch.tensor(relevance[:, None] * similarity * relevance), []
    for _ in range(keep):
        left = [i for i in range(len(relevance)) if i not in kept]
        kept.append(max(left, key=lambda i: kernel[kept + [i]][:, kept + [i]].logdet()))
    return sorted(kept)


@pytest.mark.parametrize("seed", range(4))
def test_cdpruner_is_the_greedy_determinant(seed):
    x, needs = inputs(2, 4, 8, seed)
    text, embeds = needs["text"], torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed + 100))
    for patches, options, best in ((x, {}, max), (embeds, {"patch_embeds": embeds}, lambda c: -np.mean(c))):
        for keep in (1, 3, 6):
            kept = prune.select("cdpruner", x, keep, text=text, **options)
            for i in range(2):
                relevance = naive_relevance(fp64(patches[i]), fp64(text[i, :3]), best)
                assert kept[i].tolist() == naive_dpp(fp64(x[i]), relevance, keep)


def test_cdpruner_without_a_question_or_past_the_rank():
    x, _ = inputs(2, 4, 8)
    kept = prune.select("cdpruner", x, 6, text=torch.zeros(2, 3, 8))
    assert kept.tolist() == [naive_dpp(fp64(image), np.ones(16), 6) for image in x]
    # 16 tokens of 3 directions or dimensions: after 3 picks nothing is new.
    twins = torch.eye(3)[torch.tensor([2, 0, 2, 2, 1, 0, 1, 2, 0, 1, 2, 0, 1, 1, 2, 0])]
    x = torch.stack([twins, torch.randn(16, 3, generator=torch.Generator().manual_seed(1))])
    text = torch.zeros(2, 1, 3)
    first = prune.select("cdpruner", x, 3, text=text)
    assert first[0].tolist() == [0, 1, 4]
    for row, kept in zip(first.tolist(), prune.select("cdpruner", x, 9, text=text).tolist()):
        assert kept == sorted(row + [i for i in range(16) if i not in row][:6])


def naive_vispruner(features: np.ndarray, attention: np.ndarray, keep: int, share: float) -> list[int]:
    order = sorted(range(len(attention)), key=lambda i: -attention[i])
    first = int(keep * share)
    rest, wanted = order[first:], keep - first
    while wanted and len(rest) > wanted:
        even, odd = rest[0::2], rest[1::2]
        drop = min(8, len(rest) - wanted, len(even))
        nearest = {i: max(cosine(features[i], features[j]) for j in odd) for i in even}
        rest = sorted(even, key=lambda i: -nearest[i])[drop:] + odd
    return sorted(order[:first] + rest * bool(wanted))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_vispruner(share):
    x, needs = inputs(2, 6)
    attention = needs["cls_attention"]
    for keep in (1, 2, 5, 10, 12, 13, 34, 35):  # the rest is odd or even, and may be used up in one round
        kept = prune.select("vispruner", x, keep, cls_attention=attention, important=share)
        expected = [naive_vispruner(fp64(x[i]), fp64(attention[i]), keep, share) for i in range(2)]
        assert kept.tolist() == expected


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 5, 12, 49])
def test_prumerge(keep, plus):
    x, needs = inputs(2, 7)
    result = prune.reduce("prumerge+" if plus else "prumerge", x, keep, **needs)
    for i in range(2):
        features, a = fp64(x[i]), fp64(needs["cls_attention"][i])
        keys = fp64(needs["keys"][i].transpose(0, 1).reshape(49, 8))
        spread = (keep - 1) // 2 if plus else 0
        kept = sorted(range(49), key=lambda j: -a[j])[: keep - 1 - spread]
        left = [j for j in range(49) if j not in kept]
        kept = sorted(kept + [left[int((n + 0.5) * len(left) / spread)] for n in range(spread)])
        assert len(set(kept)) == keep - 1
        expected = []
        for k in kept:
            near = sorted((j for j in range(49) if j != k), key=lambda j: -cosine(keys[k], keys[j]))[:32]
            expected.append(features[k] + sum(a[j] * features[j] for j in near))
        expected.append(sum(a[j] * features[j] for j in range(49) if j not in kept))
        np.testing.assert_allclose(result[i].numpy(), np.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid, keep, shape", [
    (24, 144, (12, 12)), (24, 64, (8, 8)), (24, 58, (7, 8)), (7, 3, (1, 2)), (5, 24, (4, 5)), (6, 36, (6, 6)),
])  # fmt: skip
def test_pool(grid, keep, shape):
    fits = [(h, w) for h in range(1, grid + 1) for w in range(h, min(grid, 2 * h) + 1) if h * w <= keep]
    assert shape == max(fits, key=lambda s: (s[0] * s[1], s[0] - s[1]))
    x, _ = inputs(2, grid, 4)
    assert prune.kept_tokens("pool", keep, grid * grid, grid) == math.prod(shape)
    picture = fp64(x).reshape(2, grid, grid, 4)
    down, across = ([slice(i * grid // n, -(-(i + 1) * grid // n)) for i in range(n)] for n in shape)
    expected = np.stack([picture[:, r, c].mean((1, 2)) for r in down for c in across], 1)
    np.testing.assert_allclose(prune.reduce("pool", x, keep, grid=grid).numpy(), expected, rtol=0, atol=1e-6)


def test_visionzip_spends_the_papers_share_on_context():
    x, needs = inputs(1, 24)
    for keep, contextual in ((64, 10), (128, 20), (192, 30), (58, 9), (4, 1), (3, 0)):
        explicit = prune.reduce("visionzip", x, keep, **needs, contextual=contextual)
        assert torch.equal(prune.reduce("visionzip", x, keep, **needs), explicit)
        own = (explicit[0, :, None] == x[0]).all(2).any(1)  # which are patches as they were
        assert own.tolist() == [False] + [True] * (keep - contextual - 1) + [False] * contextual


@pytest.mark.parametrize("step", [1, 7, 1 << 32, -(1 << 40)])
def test_random_keeps_every_token_and_every_pair_alike(step):
    images, tokens, keep = 6000, 12, 4
    kept = prune.select("random", torch.empty(images, tokens, 1), keep, seeds=step * torch.arange(images))
    chosen = torch.zeros(images, tokens).scatter(1, kept, 1.0)
    assert len(chosen.unique(dim=0)) > 485  # of 12 over 4 = 495 subsets
    for counts, p in (
        (chosen.sum(0), keep / tokens),
        ((chosen.T @ chosen)[~torch.eye(tokens, dtype=torch.bool)], keep * 3 / (tokens * 11)),
        ((chosen[1:].T @ chosen[:-1]).flatten(), (keep / tokens) ** 2),  # neighbouring seeds are independent
    ):
        assert (counts - images * p).abs().max() < 4.5 * math.sqrt(images * p * (1 - p))


def test_random_is_the_same_everywhere_and_ties_go_to_the_lowest_index():
    kept = prune.select("random", torch.empty(3, 100, 1), 5, seeds=torch.tensor([0, 1, 2**40 + 1]))
    assert kept.tolist() == [[17, 38, 40, 90, 95], [23, 28, 59, 64, 82], [10, 64, 65, 77, 79]]
    x, needs = inputs(2, 6)
    needs["cls_attention"] = torch.tensor([0.5, 0.0]).repeat(18).expand(2, -1)
    assert prune.select("fastervlm", x, 20, **needs).tolist() == [sorted([*range(0, 36, 2), 1, 3])] * 2
    assert prune.select("cdpruner", torch.zeros_like(x), 5, **needs).tolist() == [[0, 1, 2, 3, 4]] * 2


# --- What all promise
@pytest.mark.parametrize("name", prune.PRUNERS)
def test_every_count(name):
    """The shape follows from sizes alone, so that a meta device knows it; autocast does not change a bit."""
    x, needs = inputs(2)
    for keep in range(1, 37):
        out = prune.reduce(name, x, keep, **needs)
        count = math.prod(prune.pool_shape(keep, 6)) if name == "pool" else keep
        assert out.shape == (2, count, 16) and prune.PRUNERS[name].count(keep, 6, [1] * 36) == count
        on_meta = prune.reduce(name, x.to("meta"), keep, **convert(needs, lambda t: t.to("meta")))
        assert on_meta.is_meta and on_meta.shape == out.shape
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prune.reduce(name, x, keep, **needs), out)
        if name in SELECTING:
            kept = prune.select(name, x, keep, **needs)
            assert valid(kept, keep) and torch.equal(out, prune.gather(x, kept))


@pytest.mark.parametrize("name", prune.PRUNERS)
def test_an_image_does_not_depend_on_its_batch(name):
    x, needs = inputs(5)
    x[1], needs["text"][2], needs["cls_attention"][3] = 100 * x[1], 0.0, 1 / 36
    for keep in (1, 9, 20):
        batch = prune.reduce(name, x, keep, **needs)
        for i in range(5):
            alone = prune.reduce(name, x[i : i + 1], keep, **convert(needs, lambda t: t[i : i + 1]))
            torch.testing.assert_close(batch[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [
    torch.zeros_like, lambda t: t[:, :1].expand_as(t).clone(), lambda t: t.bfloat16(), lambda t: t.half(),
    lambda t: t * 1e-30, lambda t: t * 1e15, lambda t: t * (torch.arange(t[0].numel()).view_as(t[0]) > 50),
], ids=["zero", "constant", "bf16", "fp16", "tiny", "large", "some zero"])  # fmt: skip
@pytest.mark.parametrize("name", prune.PRUNERS)
def test_awkward_inputs_are_safe(name, change):
    x, needs = inputs()
    awkward = convert(needs, lambda t: change(t) if t.is_floating_point() else t)
    for features, given in ((change(x), needs), (x, awkward), (change(x), awkward)):
        out = prune.reduce(name, features, 13, **given)
        assert out.dtype == features.dtype and out.isfinite().all()
        if name in SELECTING:
            assert valid(prune.select(name, features, 13, **given), 13)


@pytest.mark.parametrize("name", prune.PRUNERS)
def test_gradient_reaches_features_but_no_choice(name):
    x, needs = inputs()
    x.requires_grad_()
    needs = convert(needs, lambda t: t.requires_grad_() if t.is_floating_point() else t)
    out = prune.reduce(name, x, 12, **needs)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * slope).sum().backward()
    own = out.detach().clone()
    if name == "visionzip":
        own[:, :1] = 0  # the CLS state is passed on, it is no feature
    # once the choice is made the result is linear: gradient times features = result times slope
    torch.testing.assert_close((x.grad * x).sum((1, 2)), (own * slope).sum((1, 2)), rtol=1e-4, atol=1e-4)
    assert all(needs[need].grad is None for need in ("cls_attention", "keys", "text"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
@pytest.mark.parametrize("name", prune.PRUNERS)
def test_cuda_chooses_what_the_cpu_does(name):
    x, needs = inputs(8, 24, 64)
    torch.cuda.set_sync_debug_mode("error")  # and it never waits for the device
    try:
        on = [x.cuda(non_blocking=True), convert(needs, lambda t: t.cuda(non_blocking=True))]
        out = prune.reduce(name, on[0], 58, **on[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), prune.reduce(name, x, 58, **needs), rtol=1e-5, atol=1e-5)


def test_errors_name_what_is_wrong():
    x, needs = inputs()

    def refused(words: str, call, *arguments, **options):
        with pytest.raises(ValueError, match=words.replace("+", r"\+")):
            call(*arguments, **options)

    for call in (prune.select, prune.reduce):
        refused("'magic' is unknown.*random, grid, divprune.*, coarse", call, "magic", x, 3)
        refused("cannot keep 37 of 36", call, "grid", x, 37, grid=6)
    for name in MERGING:
        refused("merges.*use reduce", prune.select, name, x, 3, **needs)
    for name, pruner in prune.PRUNERS.items():
        for need in {*pruner.needs} - {"cls"}:
            refused(f"'{name}'.* needs {need}", prune.reduce, name, x, 3, **{**needs, need: None})
    assert prune.reduce("visionzip", x, 3, **{**needs, "cls": None}).shape == (3, 3, 16)
    for grid in (0, 5):
        refused("'pool' needs a square grid", prune.reduce, "pool", x, 3, grid=grid)


@pytest.mark.parametrize("keep, expected", [(16, 16), (0.2, 16), (79, 16), (80, 80), (335, 80), (3, 16)])
def test_coarse_keeps_whole_scales(keep, expected):
    assert prune.kept_tokens("coarse", keep, 336, scales=[16, 64, 256]) == expected
    with pytest.raises(ValueError, match="'coarse' needs a connector with scales"):
        prune.kept_tokens("coarse", keep, 336)
    assert prune.select("coarse", torch.zeros(2, 80, 4), 16).tolist() == [list(range(16))] * 2
