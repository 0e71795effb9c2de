"""Packed rows: full, static, without leaks, the same for every number of workers and ranks, and resumable."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    TOKENIZER,
    broken_set,
    chat,
    draw,
    log_of,
    on_two_ranks,
    samples_of,
    slot_mask,
    small_config,
    small_plan,
    write,
)
from PIL import Image
from torch.nn.attention import varlen
from torch.utils.data import DataLoader

import data
import model
import train_pretrain
import train_sft

BLANK = Image.new("RGB", (8, 8))


def mm1_plan(steps=range(4), **fields) -> data.Plan:
    """Scenes of three kinds, six rows a step."""
    kinds = fields.pop("kinds", [("caption", 0.45), ("interleaved", 0.45), ("text", 0.1)])
    sources = [(data.Scenes(kind), weight) for kind, weight in kinds]
    return small_plan(sources, steps, **{"rows": 6, "row_length": 128, "by_kind": True} | fields)


def samples_in(plan: data.Plan) -> list[data.Sample]:
    return [sample for planned in plan for row in planned.rows for sample in row]


def read(plan: data.Plan, group: int, n: int) -> list[list[data.Sample]]:
    """What the plan makes of each of the first n records of a group."""
    results = []
    for number, (source, index) in itertools.islice(plan.order(group, 0), n):
        try:
            results.append(plan.read(plan.groups[group][source][0], index, "full", number, []))
        except data.BadRecord:
            results.append([])
    return results


# --- Rows are full
class Words:
    """A tokenizer for which the text "17" is 17 tokens."""

    start, end, system, strips = [], 1, "", False

    def encode(self, text: str) -> list[int]:
        return [2] * int(text)


class Lengths:
    """Records of given lengths, with an image in front or not."""

    kind = "caption"

    def __init__(self, lengths, image: bool):
        self.lengths, self.image = lengths, image

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> data.Record:
        text = str(int(self.lengths[i]) - 1)  # the end token is one more
        return data.Record("caption", [0, text] if self.image else [text], [BLANK] * self.image)


def distribution(name: str) -> tuple[np.ndarray, bool]:
    """4,096 lengths; those of the text alone where there is an image of 64 tokens, too."""
    r = np.random.default_rng(0)
    if name == "uniform":
        return r.integers(32, 513, 4096), False
    if name == "visual":
        return np.exp(r.normal(np.log(60), 0.8, 4096)), True
    slow = r.random(4096) < 0.4
    return np.where(slow, r.integers(300, 501, 4096), r.integers(80, 161, 4096)), False


@pytest.mark.parametrize("name", ["uniform", "visual", "fast and slow"])
def test_rows_are_full(name):
    lengths, image = distribution(name)
    source = Lengths(lengths.clip(8, 448 if image else 512).astype(int), image)
    cfg = model.ModelConfig(connector=model.ConnectorConfig("avgpool", tokens=64))
    plan = small_plan([(source, 1.0)], range(100), cfg, tokenizer=Words(), rows=8, row_length=512)
    filled = sum(sample.length for sample in samples_in(plan))
    assert filled / (100 * 8 * 512) >= 0.94


# --- No leaks
def packed_batch() -> tuple[model.VLM, list, data.Batch]:
    """Three documents in one row, a fourth in another."""
    torch.manual_seed(0)
    vlm = model.VLM(small_config())
    records = [data.Scenes(kind)[i] for i, kind in enumerate(("caption", "chat", "text", "interleaved"))]
    samples = samples_of(records, vlm.cfg)
    return vlm, samples, data.make_batch(samples, ["full"] * 4, vlm.cfg, 256, 256, rows=[[0, 1, 2], [3]])


def test_borders_of_packed_documents():
    _, samples, batch = packed_batch()
    rows = batch.student
    for i, (pieces, _) in enumerate(samples):
        alone = data.lay_out(pieces, [np.arange(8)] * 9)
        here = rows.doc_ids == i
        assert rows.positions[here].tolist() == [*range(len(alone.ids))]
        assert rows.ids[here].tolist() == alone.ids.tolist()
        assert slot_mask(rows)[here].tolist() == (alone.bank_rows != data.TEXT).tolist()
    assert (rows.doc_ids[0].unique() == torch.tensor([-1, 0, 1, 2])).all()  # one row, three documents
    _, samples, batch = packed_batch()
    rows = batch.student
    into = rows.supervised + 1
    doc_ids, slot = rows.doc_ids.flatten(), slot_mask(rows).flatten()
    assert torch.equal(doc_ids[rows.supervised], doc_ids[into]) and not slot[into].any()
    texts = sum(len(p[0]) for pieces, _ in samples for p in pieces if not isinstance(p, int) and p[1])
    first = sum(not isinstance(pieces[1], int) and pieces[1][1] for pieces, _ in samples)  # has no context
    assert len(rows.targets) == texts - first
    # The two forms say the same: positions attend within [start, next start).
    _, _, batch = packed_batch()
    rows = batch.student
    place = torch.searchsorted(rows.starts, torch.arange(rows.ids.numel(), dtype=torch.int32), right=True)
    place = place.view(rows.ids.shape)
    same = place[:, :, None] == place[:, None]
    T = rows.ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(same & causal, model.document_mask(rows.doc_ids)[:, 0])


# --- The plan
def test_shapes_are_the_same_in_every_step():
    for batch in draw(mm1_plan(tile_multiple=8, row_images=4)):
        rows, tiles = batch.student, len(batch.pixels)
        assert rows.ids.shape == (6, 128) and tiles % 8 == 0
        assert tiles - len({*batch.full_tiles.tolist()}) < 8  # no more blank ones than that takes
        assert len(rows.starts) == 6 * 8 + 1 and rows.starts[-1] == 6 * 128 and rows.longest == 128
        assert torch.equal(rows.starts, rows.starts.sort().values)
        begins = rows.positions.flatten() == 0
        begins[1:] &= rows.doc_ids.flatten()[1:] != rows.doc_ids.flatten()[:-1]
        assert len(rows.starts.unique()) - 1 == begins.sum()  # padding is a document of its own
    sources = [(Lengths([3] * 600, False), 1.0)]
    plan = small_plan(sources, range(3), tokenizer=Words(), rows=2, row_length=128)
    for planned in plan:
        batch = data.Stream(plan)[planned]
        assert len(batch.student.starts) == 2 * 16 + 1 and max(map(len, planned.rows)) == 8


def test_rows_hold_one_kind_and_no_more_images_than_allowed(recwarn):
    for planned in mm1_plan(range(20), row_images=3):
        for row in planned.rows:
            assert len({chunk.kind for chunk in row}) == 1 and sum(len(chunk.images) for chunk in row) <= 3
    mixed = mm1_plan(range(20), by_kind=False)
    assert any(len({chunk.kind for chunk in row}) > 1 for planned in mixed for row in planned.rows)
    counts = Counter(s.number for s in samples_in(mm1_plan(range(200), kinds=[("caption", 1.0)])))
    assert set(counts.values()) == {1} and {*range(data.Plan.POOL)} <= counts.keys()
    plan = mm1_plan(range(20), kinds=[("caption", 1.0), ("text", 0.0)])
    assert {sample.kind for sample in samples_in(plan)} == {"caption"}
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_long_documents_go_on_in_the_next_part_and_lose_nothing():
    def text(pieces: list) -> list[int]:
        return [i for piece in pieces if not isinstance(piece, int) for i in piece[0]]

    plan = mm1_plan(row_length=64, row_images=2)
    for (_, (_, index)), chunks in zip(plan.order(1, 0), read(plan, 1, 30)):
        record = plan.groups[1][0][0][index]  # interleaved
        pieces = data.pieces_of(record, TOKENIZER)
        assert record.kind == "interleaved"
        assert text(pieces) == [i for chunk in chunks for i in text(chunk.pieces)]
        assert record.images == [image for chunk in chunks for image in chunk.images]
        for chunk in chunks:
            numbers = [piece for piece in chunk.pieces if isinstance(piece, int)]
            assert numbers == [*range(len(chunk.images))] and chunk.tiles == len(chunk.sizes) == len(numbers)
            assert len(data.lay_out(chunk.pieces, [np.arange(8)] * 9).ids) == chunk.length <= 64
    counts = [{*map(len, read(plan, group, 30))} for group in (0, 1)]
    assert counts[0] == {1} and max(counts[1]) > 1  # a caption is cut, a document goes on


def test_ranks_micro_steps_and_workers_share_the_same_rows():
    def rows(**changes) -> list:
        return [row for batch in draw(mm1_plan(**changes)) for row in batch.student.ids.tolist()]

    one = rows()
    assert sorted(one) == sorted(rows(world=2) + rows(world=2, rank=1)) and one == rows(micro_steps=3)
    plan = mm1_plan()
    loader = DataLoader(data.Stream(plan), None, sampler=DataLoader(plan, None, num_workers=1), num_workers=2)
    assert [row for batch in loader for row in batch.student.ids.tolist()] == one


@pytest.mark.parametrize("first", [1, 17, 60])
def test_a_plan_goes_on_at_its_cursor(first):
    plans = [*mm1_plan(range(90))]
    later = [*mm1_plan(range(first, 90), cursor=plans[first - 1].cursor)]
    assert [planned.rows for planned in plans[first:]] == [planned.rows for planned in later]
    assert plans[-1].cursor[0][0] > 0  # more than one pool was used up


def test_modes_are_drawn_before_packing():
    """A pruned sample takes its pruned length, a slow one has a row of the teacher's as well."""
    modes = ["pruned", "pruned", "slow"]
    plan = mm1_plan(by_kind=False, kinds=[("chat", 1.0)], choose_mode=lambda n: modes[n % 3])
    teachers = 0
    for planned in plan:
        batch = data.Stream(plan)[planned]
        samples = [sample for row in planned.rows for sample in row]
        assert [sample.mode for sample in samples] == [modes[sample.number % 3] for sample in samples]
        for i, sample in enumerate(samples):
            slots = slot_mask(batch.student)[batch.student.doc_ids == i].sum()
            assert slots == plan.cfg.visual_tokens("full" if sample.mode == "slow" else "pruned")
        if batch.teacher is not None:
            teachers += 1
            assert batch.teacher.ids.shape[1] == 128 and batch.student.ids.shape == (6, 128)
            assert torch.equal(batch.student.targets[batch.distill], batch.teacher.targets)
    assert teachers


def test_records_are_read_and_tokenized_once(monkeypatch):
    """By the plan; the worker only decodes pictures."""
    plan, texts = mm1_plan(range(3), kinds=[("interleaved", 1.0)], row_length=64), []
    encode = TOKENIZER.encode
    assert max(map(len, read(plan, 0, 30))) > 1  # long documents do not count twice
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: texts.append(text) or encode(text))
    plans, before = [*plan], len(texts)
    assert before
    monkeypatch.setattr(data.Scenes, "__getitem__", None)
    assert all(len(data.Stream(plan)[planned].student.targets) for planned in plans) and len(texts) == before


def test_pictures_that_are_all_cut_alike_are_not_opened_by_the_plan(tmp_path, monkeypatch):
    """Only that the file is there is looked at; where the size matters the header is read."""
    source = Lengths([9] * 8, False)
    (tmp_path / "a.png").write_bytes(b"no picture")
    record = data.Record("caption", [0, "8"], [tmp_path / "a.png"])
    monkeypatch.setattr(Lengths, "__getitem__", lambda self, i: record)
    cfg = small_config()
    plan = small_plan([(source, 1.0)], range(1), cfg, tokenizer=Words(), rows=2, row_length=64)
    (planned,) = plan
    batch = data.Stream(plan)[planned]
    assert not planned.skipped and {why for why, _ in batch.plan.skipped} == {"image broken"}
    assert len(batch.student.targets) == 0
    cfg.image.cut = "anyres"
    source.name = "lengths"
    plan = small_plan([(source, 1.0)], range(1), cfg, tokenizer=Words(), rows=2, row_length=640)
    (error,) = plan
    assert isinstance(error, model.UserError) and "does not decode" in str(error)


# --- Runs
PACKED = [*SMALL, "--batch_size", "0", "--rows", "4"]


def test_the_log_tells_shares_fill_and_validation_by_kind(tmp_path, small_halves):
    flags = [*PACKED, *small_halves, *"--steps 3 --eval_every 3".split()]
    train_pretrain.main([*flags, "--out", str(tmp_path / "a")])
    log = log_of(tmp_path / "a")
    for line in log[:3]:
        shares = [value for name, value in line.items() if name.startswith("share ")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert 0.5 < line["fill"] <= 1 and 0 < line["image_fill"] <= 1
    kinds = {name for name in log[3] if name.startswith("val_loss ")}
    assert kinds == {f"val_loss {kind}" for kind in ("caption", "chat", "interleaved", "text")}
    shares = dict(data.SCENES_MIX["pretrain"])
    mean = sum(shares[kind] * log[3][f"val_loss {kind}"] for kind in shares) / sum(shares.values())
    assert log[3]["val_loss"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage, flags", [
    (train_pretrain, ""), (train_sft, "--slow_share 0.3"),
    (train_pretrain, "--decoder.experts 4 --dtype bfloat16"),
])  # fmt: skip
def test_packed_rows_compile_once(stage, flags, tmp_path, small_halves, monkeypatch):
    """After the first step no shape is new, with teachers or after a validation either: torch would raise."""
    real = train_pretrain.optimizer_step

    def strict(run, ddp, micro, optimizers, step, loss_of):
        with torch._dynamo.config.patch(error_on_recompile=step >= 1):
            return real(run, ddp, micro, optimizers, step, loss_of)

    torch._dynamo.reset()
    monkeypatch.setattr(stage, "optimizer_step", strict)
    flags = f"--steps 8 --compile true --eval_every 3 --train vit,connector,decoder {flags}".split()
    stage.main([*PACKED, *small_halves, *flags, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "latest").is_file()


# --- CUDA's kernel for documents
def documents(device: str, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    _, _, batch = packed_batch()
    rows = batch.student
    B, T = rows.ids.shape
    q = torch.randn(B, 4, T, 32, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, 2, T, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    return rows, q, k, v


def test_the_document_kernel_is_called_with_the_right_shapes(monkeypatch):
    """Traced on the meta device, where nothing is computed; a norm on q and k leaves them in float32."""
    rows, q, k, v = documents("meta", torch.bfloat16)
    real, seen = varlen.varlen_attn, []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **b: (seen.append(a[:3]), real(*a, **b))[1])
    out = model.attend(q.float(), k.float(), v, (rows.starts.to("meta"), rows.longest))
    assert out.shape == (2, 256, 4 * 32) and {x.dtype for x in seen[0]} == {torch.bfloat16}
    assert [tuple(x.shape) for x in seen[0]] == [(512, 4, 32), (512, 2, 32), (512, 2, 32)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
def test_the_document_kernel_agrees_with_the_mask():
    rows, *inputs = documents("cuda", torch.bfloat16)
    results = []
    for mask in ((rows.starts.cuda(), rows.longest), model.document_mask(rows.doc_ids.cuda())):
        out = model.attend(*inputs, mask)
        real = (rows.doc_ids >= 0).cuda()[..., None]
        grads = torch.autograd.grad((out.float() * real).square().sum(), inputs)
        results.append([out * real, *grads])
    for kernel, masked in zip(*results):
        torch.testing.assert_close(kernel.float(), masked.float(), rtol=2e-2, atol=2e-2)


def test_samples_pictures_and_teachers_must_fit_into_a_row(tmp_path, small_halves):
    cfg = small_config()
    cfg.image.cut = "split"  # five tiles of 8 tokens
    with pytest.raises(model.UserError, match="raise --row_images"):
        mm1_plan(range(1), cfg=cfg, row_images=4)
    with pytest.raises(model.UserError, match="raise --row_limit"):
        mm1_plan(range(1), cfg=cfg, row_length=40)
    flags = [*PACKED, *small_halves, *"--row_images 4 --row_length 512 --resolution +split".split()]
    with pytest.raises(model.UserError, match="5 tiles, a row takes 4"):
        train_pretrain.main([*flags, "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()
    plan = mm1_plan(range(1), kinds=[("chat", 1.0)], row_length=15, rows=2)
    planned = next(iter(plan))
    assert 0 < read(plan, 0, plan.POOL).count([]) <= len(planned.skipped)
    assert {why for why, _ in planned.skipped} == {"no answer within the limit"}
    assert "no answer is left within 15 positions" in planned.skipped[0][1]
    items = itertools.islice(plan.order(0, 0), plan.POOL)
    assert all(plan.draw(0, [item])[0] for item in items)  # others take their place
    with pytest.raises(model.UserError, match="raise --row_limit"):
        mm1_plan(row_length=8)
    # Keeping all tokens behind an isolator takes more positions than not pruning at all.
    cfg = small_config(prune=model.PruneConfig(keep=1.0, isolator=2))
    fields = {"kinds": [("chat", 1.0)], "choose_mode": lambda n: "slow", "rows": 4, "row_length": 96}
    for batch in draw(mm1_plan(range(8), cfg=cfg, **fields)):
        assert batch.teacher.ids.shape[1] == 96 and len(batch.distill) == len(batch.teacher.targets)


def test_every_text_that_goes_on_has_something_to_learn():
    """A text of one token more than a row would leave its end token alone, with nothing to tell it from."""

    class Texts(Lengths):
        def __getitem__(self, i: int) -> data.Record:
            return data.Record("text", super().__getitem__(i).parts, [])

    sources = [(Texts([129, 257, 300, 40], False), 1.0)]
    plan = small_plan(sources, range(1), tokenizer=Words(), rows=2, row_length=128)
    assert sorted(map(len, read(plan, 0, 4))) == [1, 1, 2, 3]


def test_resume_refuses_another_share_of_slow_samples(tmp_path, small_halves):
    """What it refuses of stage 1: test_train.py."""
    flags = [*PACKED, *small_halves, "--out", str(tmp_path / "a")]
    train_sft.main([*flags, "--steps", "1"])
    with pytest.raises(model.UserError, match="--slow_share cannot change"):
        train_sft.main([*flags, "--resume", "auto", "--steps", "2", "--slow_share", "0.5"])


def rows_and_reads(rank: int, folder: str, board: tuple | None) -> tuple[str, int]:
    """All rows of this rank with cursors and what was skipped, and how often it read a record."""
    plan = small_plan(
        f"{folder}/train.json", steps=range(120), rows=8, row_length=128, rank=rank, world=2,
        board=board, cursor=[[1, 3]],
    )  # fmt: skip
    reads, read = [], plan.read
    plan.read = lambda *arguments: reads.append(arguments[1]) or read(*arguments)
    return str([(p.rows, p.cursor, p.skipped) for p in plan.micro_batches()]), len(reads)


def test_ranks_share_the_pools_that_they_draw(tmp_path):
    """The rows of ranks that draw everything, for little more than half of the reading."""
    broken_set(tmp_path, 400)
    board = data.open_store("localhost", 0, is_master=True, wait_for_workers=False)
    place = ("localhost", board.port)
    for rank, shared in enumerate(on_two_ranks(rows_and_reads, tmp_path / "r", str(tmp_path), place)):
        rows, reads = rows_and_reads(rank, str(tmp_path), None)
        assert shared[0] == rows and shared[1] < 0.7 * reads


def errors_of_rank(rank: int, folder: str, board: tuple) -> str:
    plan = small_plan(f"{folder}/train.json", rows=8, row_length=128, rank=rank, world=2, board=board)
    board = data.open_store(*board, is_master=False)
    board.set("large", bytes(9_000_000))  # a pool of long documents
    if rank == 1:
        plan.draw = lambda group, order: ([], [])  # never asked for: the first pool is that of rank 0
    (error,) = plan
    return str(error)


def test_an_error_of_one_planner_is_one_of_all(tmp_path):
    write(tmp_path / "train.json", [chat(None, "What? " * 200, "Red.")] * 3)
    board = data.open_store("localhost", 0, is_master=True, wait_for_workers=False)
    place = ("localhost", board.port)
    errors = on_two_ranks(errors_of_rank, tmp_path / "r", str(tmp_path), place)
    assert errors[0] == errors[1] and "records of train one after the other cannot be used" in errors[0]
