"""Visual token pruning as a training tool: mode isolator, fast or slow, self-distillation, and the pruners.

DualSpeed (arXiv 2602.03815) trains most samples on pruned visual tokens (fast mode), and a few on all of them
(slow mode) with the model in its fast mode as teacher: see data.make_batch, VLM.bank, VLM.forward, train_sft.

    mode    the student reads                            loss
    pruned  text | isolator (l) | kept tokens (K) | text   CE             (the paper's fast mode)
    slow    text | all tokens (V)                 | text   CE + weight * T^2 * KL(teacher || student)

The teacher of a slow sample reads what a pruned one would, without gradient. Mode "full" is slow without it.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- DualSpeed: the mode isolator, which samples are slow, self-distillation -------------------------------


class ModeIsolator(nn.Module):
    """l learned vectors in front of every image's pruned tokens tell the decoder that it is in fast mode.
    They start uniform within 1/sqrt(D), as in DualSpeed's code.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(length, width).uniform_(-bound, bound))

    def forward(self, kept: Tensor) -> Tensor:
        """(I, K, D) -> (I, l + K, D)"""
        return torch.cat([self.weight.to(kept.dtype).expand(len(kept), -1, -1), kept], 1)


def draw_mode(seed: int, number: int, slow_share: float) -> str:
    """The mode of a sample (in the paper of a batch): "slow" with probability slow_share, else "pruned".
    A pure function of (seed, number), so that every rank, worker and restart draws the same.
    """
    digest = hashlib.blake2b(f"mode-{seed}-{number}".encode(), digest_size=8).digest()
    return "slow" if int.from_bytes(digest, "big") / 2**64 < slow_share else "pruned"


def distillation_sum(student: Tensor, teacher: Tensor, temperature: float, chunk: int = 2048) -> Tensor:
    """Sum over rows of KL(teacher || student) * T^2, logits (R, N), in chunks of rows to save memory."""
    total = student.new_zeros(())
    for s, t in zip(student.split(chunk), teacher.detach().split(chunk)):
        log_s = F.log_softmax(s.float() / temperature, -1)
        log_t = F.log_softmax(t.float() / temperature, -1)
        total = total + F.kl_div(log_s, log_t, log_target=True, reduction="sum")
    return total * temperature**2


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DualSpeed's loss: KL(teacher || student), mean over the rows (answer positions of all slow samples)."""
    return distillation_sum(student, teacher, temperature) / len(student)


# ---------------------------------------------------------------------------------------------------------
# Pruners: which tokens of an image are kept, a function each and one dict (PRUNERS). Choices are made without
# gradient, in fp32, for all images at once but each image by itself; equal scores go to the lowest index. So
# equal features give equal choices, on every device and in every batch.


class Pruner(NamedTuple):
    """What the model has to know of a pruner.

    where: "tokens" behind any connector; "grid" behind one whose tokens form a square raster; "patches" in
    front of a per-patch connector (linear, mlp), which then runs on what is kept; "scales" Chain-of-Sight's.
    needs: what `run` gets besides features and keep. seeds (I,) int64; grid, tokens a side, 0 if none; cls
    (I, 1, C), the encoder's CLS state or None; cls_attention (I, P), mean over heads; keys (I, H, P, d);
    text (I, M, C), the embedded words of the question, zeros at padding.
    """

    run: Callable  # (features (I, V, D), keep, **needs) -> indices (I, K), or new tokens if it merges
    where: str = "tokens"
    needs: tuple[str, ...] = ()
    merges: bool = False
    count: Callable = lambda keep, grid, scales: keep  # how many tokens come out


def unit(x: Tensor) -> Tensor:
    """Unit length along the last dimension, in fp32; zeros (an empty patch, padding) stay zeros, not NaN."""
    return F.normalize(x.float(), dim=-1, eps=1e-12)


def ranked(scores: Tensor) -> Tensor:
    """Indices from the highest score to the lowest. topk promises no order among equals; this one does."""
    return scores.float().argsort(dim=-1, descending=True, stable=True)


def marked(index: Tensor, tokens: int) -> Tensor:
    """(..., K) indices -> (..., V) true at those"""
    marks = torch.zeros(*index.shape[:-1], tokens, dtype=torch.bool, device=index.device)
    return marks.scatter(-1, index, True)


def others(index: Tensor, tokens: int) -> Tensor:
    """(I, K) indices -> the (I, V-K) that are not among them, in raster order"""
    order = marked(index, tokens).int().argsort(dim=1, stable=True)  # the unmarked come first
    return order[:, : tokens - index.shape[1]]


def centres(parts: int, length: int, device) -> Tensor:
    """The middles of `parts` equal parts of range(length): floor((i + 1/2) * length / parts)"""
    return (2 * torch.arange(parts, device=device) + 1) * length // max(1, 2 * parts)


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, that looks random. Products stay below 2^63."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random_tokens(features: Tensor, keep: int, seeds: Tensor, **_) -> Tensor:
    """A random subset of every image, by a hash of its seed: the baseline that many pruners do not beat."""
    image = mix(mix(seeds & 0xFFFFFFFF) ^ ((seeds >> 32) & 0xFFFFFFFF))  # (I,)
    token = 0x9E3779B9 * torch.arange(1, features.shape[1] + 1, device=features.device)  # 2^32 / golden ratio
    return mix((image[:, None] + token) & 0xFFFFFFFF).argsort(dim=1, stable=True)[:, :keep]


def grid_tokens(features: Tensor, keep: int, grid: int, **_) -> Tensor:
    """The same tokens for every image: on a square grid of patches the centres of r x c cells with r*c <= K,
    and K - r*c tokens evenly strided over the others; where tokens form no one grid, an even stride.
    """
    tokens = features.shape[1]
    device = features.device
    rows = min(grid, math.isqrt(keep)) if grid * grid == tokens else 0
    columns = min(grid, keep // rows) if rows else 0
    cells = centres(rows, grid, device)[:, None] * grid + centres(columns, grid, device)
    chosen = cells.reshape(1, -1)  # (1, r*c)
    left = others(chosen, tokens)
    strided = left[:, centres(keep - chosen.shape[1], left.shape[1], device)]
    chosen = torch.cat([chosen, strided], 1)  # (1, K)
    return chosen.expand(len(features), -1)


def divprune(features: Tensor, keep: int, **_) -> Tensor:
    """Greedy max-min diversity under cosine distance (DivPrune; DualSpeed's default), all images at once.

    The first token is the one farthest from its nearest neighbour; each next one is farthest from all that
    are picked. K sequential rounds of O(I*V) after one product of I*V*V*D.
    """
    x = unit(features)  # a zero feature stays zero: distance 1 to all
    distance = 1 - x @ x.transpose(1, 2)  # (I, V, V)
    images, tokens, _ = distance.shape
    here = torch.arange(images, device=x.device)
    itself = torch.eye(tokens, dtype=torch.bool, device=x.device)
    nearest = distance.masked_fill(itself, math.inf).amin(2)  # (I, V)
    picked = torch.zeros(images, tokens, dtype=torch.bool, device=x.device)
    kept = []
    for _ in range(keep):
        best = nearest.masked_fill(picked, -math.inf).argmax(1)  # (I,), the first of equals
        picked[here, best] = True
        nearest = torch.minimum(nearest, distance[here, best]) if kept else distance[here, best]
        kept.append(best)
    return torch.stack(kept, 1)


def stretch(x: Tensor) -> Tensor:
    """Scores (I, V) of each image to (x - min + 1e-6) / (max - min); equal scores (no question) become 1.
    CDPruner's code normalises over the whole batch, which makes the choice depend on the other images.
    """
    low, high = x.aminmax(dim=1, keepdim=True)
    return torch.where(high - low > 1e-6, (x - low + 1e-6) / (high - low).clamp_min(1e-6), 1.0)


def relevance(features: Tensor, text: Tensor) -> Tensor:
    """In the decoder's own space: how near a token (I, V, D) is to the nearest word of the question (I, V).

    Ours. The mean over the text, as CDPruner takes it, misses what the question is about, with either sign:
    all words have much in common, and blank paper is nearest to that. The nearest word does not (LOG.md).
    """
    words = unit(text)  # (I, M, D)
    cosine = unit(features) @ words.transpose(1, 2)  # (I, V, M)
    padding = ~words.any(2)[:, None]
    return cosine.masked_fill(padding, -1.0).amax(2)


def cdpruner(features: Tensor, keep: int, text: Tensor, patch_embeds: Tensor | None = None, **_) -> Tensor:
    """CDPruner: a subset that is diverse and fits the question, by greedy MAP of a conditional DPP.

    Each round picks the token that raises the determinant of L = diag(rel) S diag(rel) most, where S is the
    cosine similarity; incremental Cholesky keeps each token's d^2, what is new about it. Once K passes the
    rank of L, nothing is new. patch_embeds (I, V, C): the patches in CLIP's space shared with `text`, where
    the official code finds a LOW mean similarity relevant; without them, `relevance` of the features.
    """
    if patch_embeds is None:
        relevant = stretch(relevance(features, text))  # (I, V)
    else:
        relevant = stretch(-(unit(patch_embeds) @ unit(text).transpose(1, 2)).mean(2))
    x = relevant[..., None] * unit(features)
    kernel = x @ x.transpose(1, 2)  # (I, V, V)
    images, tokens, _ = kernel.shape
    here = torch.arange(images, device=x.device)
    new = kernel.diagonal(dim1=1, dim2=2)  # (I, V), d^2
    noise = 1e-5 * new  # rounding residue of tokens already spanned by the picked ones; not novelty
    factor = kernel.new_zeros(images, keep, tokens)
    picked = torch.zeros_like(new, dtype=torch.bool)
    kept = []
    for k in range(keep):
        best = new.masked_fill(picked, -math.inf).argmax(1)  # (I,), the first of equals
        own = new[here, best][:, None]
        row = kernel[here, best] - (factor[here, :k, best][:, None] @ factor[:, :k])[:, 0]
        factor[:, k] = row = torch.where(own > 0, row / own.clamp_min(1e-30).sqrt(), 0.0)
        new = new - row**2
        new = torch.where(new > noise, new, 0.0)
        picked[here, best] = True
        kept.append(best)
    return torch.stack(kept, 1)


def fastervlm(features: Tensor, keep: int, cls_attention: Tensor, **_) -> Tensor:
    """FasterVLM: the patches that the encoder's CLS token attends to most."""
    return ranked(cls_attention)[:, :keep]


def vispruner(features: Tensor, keep: int, cls_attention: Tensor, important: float = 0.5, **_) -> Tensor:
    """VisPruner: a share `important` by CLS attention, the others by removing duplicates.

    The patches that are not important, in order of attention, are split into even and odd positions. Of the
    even ones the 8 (fewer in the last round) most similar to an odd one are dropped; those that stay come
    before the odd ones in the next round. With an odd number, where the official code fails, there is one
    more even position. Pairs depend on ranks, so bf16 features keep other patches than fp32 (11 of 16 agree).
    """
    order = ranked(cls_attention)  # (I, V)
    first = int(keep * important)
    rest = order[:, first:] if first < keep else order[:, :0]  # (I, R)
    x = unit(features)
    similarity = (x @ x.transpose(1, 2)).flatten(1)  # once, (I, V*V); each round only looks up
    while (surplus := first + rest.shape[1] - keep) > 0:
        even, odd = rest[:, ::2], rest[:, 1::2]
        pair = even[:, :, None] * features.shape[1] + odd[:, None]  # (I, ceil(R/2), floor(R/2))
        nearest = similarity.gather(1, pair.flatten(1)).view_as(pair).amax(2)  # (I, ceil(R/2))
        stay = ranked(nearest)[:, min(8, surplus) :]
        rest = torch.cat([even.gather(1, stay), odd], 1)
    return torch.cat([order[:, :first], rest], 1)


def pool_shape(keep: int, grid: int, scales=()) -> tuple[int, int]:
    """Rows and columns of the pooled grid: the most cells that fit into `keep`, at most twice as wide as tall
    (1 x 57 would be no picture), the squarest of equals: 144 -> 12 x 12, 58 -> 7 x 8, 3 -> 1 x 2.
    """
    if grid < 1:
        raise ValueError("pruner 'pool' needs tokens that form a square grid")
    shapes = [(h, min(keep // h, 2 * h, grid)) for h in range(1, min(grid, math.isqrt(keep)) + 1)]
    return max(shapes, key=lambda shape: (math.prod(shape), shape[0]))


def pool(features: Tensor, keep: int, grid: int, **_) -> Tensor:
    """Means over an h x w partition of the grid (pool_shape); cells overlap where it does not divide."""
    if grid * grid != features.shape[1]:
        raise ValueError(f"pruner 'pool' needs a square grid: {features.shape[1]} tokens are not {grid}^2")
    x = features.transpose(1, 2).unflatten(2, (grid, grid))  # (I, D, S, S)
    return F.adaptive_avg_pool2d(x, pool_shape(keep, grid)).flatten(2).transpose(1, 2)  # (I, h*w, D)


def visionzip(
    features: Tensor, keep: int, cls: Tensor | None, cls_attention: Tensor, keys: Tensor, contextual=None, **_
) -> Tensor:
    """VisionZip: CLS if there is one, the patches it attends to most in raster order, and `contextual` merged
    tokens: every stride-th of the others plus the mean of those whose keys (mean over heads) are nearest.

    K in all; contextual is 10 of 64, 20 of 128, 30 of 192 as in the paper. Merging is a sum, as in the
    official code, so that a merged token is about twice as long as a patch.
    """
    tokens = features.shape[1]
    first = [] if cls is None else [cls.to(features.dtype)]
    if contextual is None:
        contextual = round(keep * 5 / 32)
    contextual = min(contextual, keep - len(first))
    dominant = ranked(cls_attention)[:, : keep - contextual - len(first)].sort(1).values
    if not contextual:
        return torch.cat([*first, gather(features, dominant)], 1)
    rest = others(dominant, tokens)  # (I, R)
    targets = rest[:, :: max(1, rest.shape[1] // contextual)][:, :contextual]
    with torch.no_grad():
        key = unit(keys.float().mean(1))  # (I, P, d)
        nearest = (gather(key, targets) @ key.transpose(1, 2)).argmax(1)  # (I, P), the first of equals
        member = nearest[:, None] == torch.arange(contextual, device=nearest.device)[:, None]  # (I, ctx, P)
        member = (member & ~marked(torch.cat([dominant, targets], 1), tokens)[:, None]).float()
        weights = member / member.sum(2, keepdim=True).clamp_min(1)
    merged = gather(features, targets).float() + weights @ features.float()
    return torch.cat([*first, gather(features, dominant), merged.to(features.dtype)], 1)  # (I, K, D)


def prumerge(
    features: Tensor, keep: int, cls_attention: Tensor, keys: Tensor, strided: float = 0.0, **_
) -> Tensor:
    """PruMerge at a fixed count: the K-1 patches that CLS attends to most, each plus the attention-weighted
    sum of the 32 patches with the most similar keys (kept ones too); last the weighted sum of all not kept.

    strided: the share (PruMerge+: half) that is evenly strided over the others instead. The original reads q
    and k of the encoder's last layer, keeps a count that varies and emits in order of attention; here they
    are those of the connector's level, the count is fixed, so that batches are dense, and the order raster.
    """
    tokens = features.shape[1]
    with torch.no_grad():
        spread = int((keep - 1) * strided)
        kept = ranked(cls_attention)[:, : keep - 1 - spread]
        left = others(kept, tokens)
        left = left[:, centres(spread, left.shape[1], features.device)]
        kept = torch.cat([kept, left], 1)
        kept = kept.sort(1).values  # (I, K-1)
        key = unit(keys.transpose(1, 2).flatten(2))  # (I, P, H*d)
        similarity = gather(key, kept) @ key.transpose(1, 2)  # (I, K-1, P)
        near = ranked(similarity.scatter(2, kept[..., None], -math.inf))[..., : min(32, tokens - 1)]
        member = torch.cat([marked(near, tokens), ~marked(kept, tokens)[:, None]], 1)  # (I, K, P)
        weights = member * cls_attention.float()[:, None]
    base = F.pad(gather(features, kept).float(), (0, 0, 0, 1))  # nothing under the last
    return (base + weights @ features.float()).to(features.dtype)  # (I, K, D)


def coarse_tokens(features: Tensor, keep: int, **_) -> Tensor:
    """Chain-of-Sight's coarse scales, which come first: the same tokens that its stage 1 runs on."""
    return torch.arange(keep, device=features.device).expand(len(features), -1)


def coarse_count(keep: int, grid: int, scales) -> int:
    """As many whole scales as fit into `keep`, at least the first. scales: tokens of each, coarse to fine."""
    if not scales:
        raise ValueError("pruner 'coarse' needs a connector with scales, coarse to fine")
    return max([n for n in accumulate(scales) if n <= keep], default=scales[0])


PRUNERS = {
    "random": Pruner(random_tokens, needs=("seeds",)),
    "grid": Pruner(grid_tokens, needs=("grid",)),
    "divprune": Pruner(divprune),
    "cdpruner": Pruner(cdpruner, needs=("text",)),
    "fastervlm": Pruner(fastervlm, "patches", ("cls_attention",)),
    "vispruner": Pruner(vispruner, "patches", ("cls_attention",)),
    "pool": Pruner(pool, "grid", ("grid",), True, lambda *sizes: math.prod(pool_shape(*sizes))),
    "visionzip": Pruner(visionzip, "patches", ("cls", "cls_attention", "keys"), True),
    "prumerge": Pruner(prumerge, "patches", ("cls_attention", "keys"), True),
    "prumerge+": Pruner(partial(prumerge, strided=0.5), "patches", ("cls_attention", "keys"), True),
    "coarse": Pruner(coarse_tokens, "scales", count=coarse_count),
}


def find(name: str) -> Pruner:
    if name not in PRUNERS:
        raise ValueError(f"pruner '{name}' is unknown: use one of {', '.join(PRUNERS)}")
    return PRUNERS[name]


def kept_tokens(name: str, keep: float, tokens: int, grid: int = 0, scales: Sequence[int] = ()) -> int:
    """How many tokens pruner `name` makes of `tokens`. keep: a count if above 1, else a share.

    grid: tokens a side, 0 if none. scales: tokens of each scale, coarse to fine. DualSpeed's code truncates
    int((1 - 0.9) * 576) = 57 where we round to 58; pass keep=57 for parity.
    """
    if keep <= 1:
        keep = keep * tokens
    keep = min(tokens, max(1, round(keep)))
    return find(name).count(keep, grid, scales)


def run_pruner(name: str, features: Tensor, keep: int, needs: dict) -> Tensor:
    pruner = find(name)
    if not 1 <= keep <= features.shape[1]:
        raise ValueError(f"cannot keep {keep} of {features.shape[1]} tokens")
    for need in pruner.needs:
        if needs.get(need) is None and need != "cls":  # not every encoder has one
            raise ValueError(f"pruner '{name}' needs {need}, which is not given")
    device = "cpu" if features.is_meta else features.device.type  # meta knows no autocast
    with torch.autocast(device, enabled=False):  # or the distances would come out in bf16
        return pruner.run(features, keep, **{"cls": None, **needs})


@torch.no_grad()
def select(name: str, features: Tensor, keep: int, **needs) -> Tensor:
    """Indices of the `keep` tokens that pruner `name` keeps of each image: (I, V, D) -> (I, keep), sorted.
    ValueError for an unknown name, one that merges, a missing need (see Pruner) and a keep outside 1..V.
    """
    if find(name).merges:
        raise ValueError(f"pruner '{name}' merges tokens, it selects none: use reduce")
    return run_pruner(name, features, keep, needs).sort(1).values


def reduce(name: str, features: Tensor, keep: int, **needs) -> Tensor:
    """The pruned tokens of each image, with gradient: (I, V, D) -> (I, K', D), K' by `kept_tokens`, in the
    dtype of the features. For every pruner; errors as in `select`.
    """
    if find(name).merges:
        return run_pruner(name, features, keep, needs)
    return gather(features, select(name, features, keep, **needs))


def gather(features: Tensor, kept: Tensor) -> Tensor:
    """features (I, V, D), kept (I, K) -> (I, K, D), with gradient."""
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
