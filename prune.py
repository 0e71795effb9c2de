"""Visual token pruning as a training tool: pruners, the mode isolator, fast or slow, self-distillation.

DualSpeed (arXiv 2602.03815) trains most samples on pruned visual tokens (fast mode) and a few on all of them
(slow mode), where the model's own fast mode is the teacher. Everything that paper adds is in this file,
except the loop itself, which is train_sft.py.

    fast:  text | isolator (l) | kept tokens (K) | text      loss = CE
    slow:  text | all tokens (V)                 | text      loss = CE + weight * KL(fast || slow) *
    temperature^2
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------
# Pruners: features (I, V, D) -> indices of the kept tokens (I, K), sorted. They run without gradients and in
# fp32; gradients reach the connector through `gather`. Ties go to the lowest index, so every device agrees.


def kept_tokens(tokens: int, keep: float) -> int:
    """How many of `tokens` the fast mode keeps: a count if keep > 1, else round(keep * tokens), at least one.

    DualSpeed's code truncates int((1 - 0.9) * 576) = 57 where we round to 58; pass keep=57 for parity.
    """
    return min(tokens, max(1, round(keep if keep > 1 else keep * tokens)))


def random_tokens(features: Tensor, keep: int, seed: int = 0, **_) -> Tensor:
    """A random subset of every image: the baseline that many pruners do not beat. seed: that of the batch."""
    images, tokens, _ = features.shape
    scores = torch.rand(
        images, tokens, generator=torch.Generator().manual_seed(seed)
    )  # on a CPU: same everywhere
    return scores.argsort(1)[:, :keep].to(features.device)


def grid_tokens(features: Tensor, keep: int, grid: int = 0, **_) -> Tensor:
    """The same tokens for every image. A square grid of patches: the centres of r x c cells with r*c <= K,
    the rest evenly strided over what is left. Tokens of several scales have no one grid: an even stride.
    """
    images, tokens, _ = features.shape
    chosen = []
    if grid and grid * grid == tokens:
        rows = max(1, math.isqrt(keep))
        columns = min(grid, keep // rows)
        at = [[int((i + 0.5) * grid / n) for i in range(n)] for n in (min(rows, grid), columns)]
        chosen = [r * grid + c for r in at[0] for c in at[1]]
    left = sorted(set(range(tokens)) - set(chosen))
    missing = keep - len(chosen)
    chosen += [left[int((i + 0.5) * len(left) / missing)] for i in range(missing)]
    return torch.tensor(chosen, device=features.device).expand(images, -1)


def divprune(features: Tensor, keep: int, **_) -> Tensor:
    """Greedy max-min diversity under cosine distance (DivPrune; DualSpeed's default), all images at once.

    First the token farthest from its nearest neighbour, then always the one farthest from all that are
    picked. K rounds of O(I*V) after one I*V*V*D product; only the K rounds are sequential.
    """
    x = F.normalize(features.float(), dim=-1, eps=1e-12)  # a zero feature stays zero: distance 1 to all
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


PRUNERS = {"random": random_tokens, "grid": grid_tokens, "divprune": divprune}


@torch.no_grad()
def select(name: str, features: Tensor, keep: int, **needs) -> Tensor:
    """Indices of the `keep` tokens that pruner `name` keeps of each image: (I, V, D) -> (I, keep), sorted.

    needs: grid (patches a side), seed (of "random").
    """
    if name not in PRUNERS:
        raise ValueError(f"pruner '{name}' is unknown: use one of {', '.join(PRUNERS)}")
    if not 1 <= keep <= features.shape[1]:
        raise ValueError(f"cannot keep {keep} of {features.shape[1]} tokens")
    device = "cpu" if features.is_meta else features.device.type  # meta knows no autocast
    with torch.autocast(device, enabled=False):  # or the distances would come out in bf16
        return PRUNERS[name](features, keep, **needs).sort(1).values


def gather(features: Tensor, kept: Tensor) -> Tensor:
    """features (I, V, D), kept (I, K) -> (I, K, D), with gradient."""
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


# ---------------------------------------------------------------------------------------------------------
# Mode isolator, mode, distillation


class ModeIsolator(nn.Module):
    """l learned vectors in front of every image's pruned tokens tell the decoder that it is in fast mode.

    Initialised as DualSpeed's code does, uniform within 1/sqrt(D); full tokens go without.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(length, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
        )

    def forward(self, kept: Tensor) -> Tensor:
        """(I, K, D) -> (I, l + K, D)"""
        return torch.cat([self.weight.to(kept.dtype).expand(len(kept), -1, -1), kept], 1)


def draw_mode(seed: int, number: int, slow_share: float) -> str:
    """ "slow" with probability slow_share, else "fast": a pure function of (seed, number).

    number: that of a sample, or of a batch in the paper's way; every rank and every restart draws the same.
    """
    digest = hashlib.blake2b(f"mode-{seed}-{number}".encode(), digest_size=8).digest()
    return "slow" if int.from_bytes(digest, "big") / 2**64 < slow_share else "fast"


def distillation_sum(student: Tensor, teacher: Tensor, temperature: float, chunk: int = 2048) -> Tensor:
    """Sum over rows of KL(teacher || student) * T^2, logits (R, N), in chunks of rows to save memory."""
    total = student.new_zeros(())
    for s, t in zip(student.split(chunk), teacher.detach().split(chunk)):
        log_s = F.log_softmax(s.float() / temperature, -1)
        log_t = F.log_softmax(t.float() / temperature, -1)
        total = total + F.kl_div(log_s, log_t, log_target=True, reduction="sum")
    return total * temperature**2


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DualSpeed's loss: forward KL, mean over the rows (answer positions of all slow samples)."""
    return distillation_sum(student, teacher, temperature) / len(student)
