"""Packed rows: full, static, without leaks, the same for every number of workers and ranks, and resumable."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import test_training
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import varlen

import data
import model
import train_pretrain
import train_sft

TOKENIZER = test_training.TOKENIZER
BLANK = Image.new("RGB", (8, 8))
SPLIT = [("caption", 0.45), ("interleaved", 0.45), ("text", 0.1)]


def small_plan(steps=range(4), **changes) -> data.Plan:
    sources = [(data.Scenes(kind), weight) for kind, weight in changes.pop("kinds", SPLIT)]
    mode = changes.pop("choose_mode", lambda n: "full")
    cfg = test_training.small_config()
    fixed = {"row_length": 128, "by_kind": True} | changes
    return data.Plan(sources, TOKENIZER, cfg, mode, 0, steps, fixed.pop("batch_rows", 6), **fixed)


def draw(plan: data.Plan) -> list[data.Batch]:
    return [data.Stream(plan)[planned] for planned in plan]


# ---------------------------------------------------------------------------------------------------------
# Rows are full


class Words:
    """A tokenizer for which the text "17" is 17 tokens."""

    start, end = [], 1

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
    slow = r.random(4096) < 0.4
    return {
        "lognormal": (np.exp(r.normal(np.log(110), 0.8, 4096)), False),
        "uniform": (r.integers(32, 513, 4096), False),
        "visual": (np.exp(r.normal(np.log(60), 0.8, 4096)), True),
        "fast and slow": (np.where(slow, r.integers(300, 501, 4096), r.integers(80, 161, 4096)), False),
    }[name]


@pytest.mark.parametrize("name", ["lognormal", "uniform", "visual", "fast and slow"])
def test_rows_are_full(name):
    lengths, image = distribution(name)
    source = Lengths(lengths.clip(8, 448 if image else 512).astype(int), image)
    cfg = model.ModelConfig(connector=model.ConnectorConfig("avgpool", tokens=64))
    plan = data.Plan([(source, 1.0)], Words(), cfg, lambda n: "full", 0, range(100), 8, row_length=512)
    assert np.mean([planned.fill for planned in plan]) >= 0.94


# ---------------------------------------------------------------------------------------------------------
# No leaks


def packed_batch() -> tuple[model.VLM, list, data.Batch]:
    """Three documents in one row, a fourth in another."""
    torch.manual_seed(0)
    vlm = model.VLM(test_training.small_config())
    records = [data.Scenes(kind)[i] for i, kind in enumerate(("caption", "chat", "text", "interleaved"))]
    samples = [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, vlm.cfg)) for r in records]
    return vlm, samples, data.make_batch(samples, ["full"] * 4, vlm.cfg, 256, 256, rows=[[0, 1, 2], [3]])


@pytest.mark.parametrize("document", range(3))
def test_a_changed_document_leaves_the_others_bit_equal(document):
    vlm, _, batch = packed_batch()
    rows = batch.student
    here = (rows.doc_ids == document) & ~rows.slot_mask
    x = vlm.splice(rows, vlm.bank(batch))
    hidden, _ = vlm.decoder.hidden(x, rows.positions, model.document_mask(rows.doc_ids))
    changed = torch.where(here[..., None], x.flip(-1), x)
    other, _ = vlm.decoder.hidden(changed, rows.positions, model.document_mask(rows.doc_ids))
    same = rows.doc_ids != document
    assert torch.equal(hidden[same], other[same]) and not torch.equal(hidden[here], other[here])


def test_positions_restart_and_images_are_where_they_were():
    _, samples, batch = packed_batch()
    rows = batch.student
    for i, (pieces, _) in enumerate(samples):
        alone = data.lay_out(pieces, [np.arange(8)] * 9)
        here = rows.doc_ids == i
        assert rows.positions[here].tolist() == [*range(len(alone.ids))]
        assert rows.ids[here].tolist() == alone.ids.tolist()
        assert rows.slot_mask[here].tolist() == (alone.slot >= 0).tolist()
    assert (rows.doc_ids[0].unique() == torch.tensor([-1, 0, 1, 2])).all()  # one row, three documents


def test_the_loss_of_a_pack_is_the_token_weighted_loss_of_its_parts():
    """And so is its gradient; in double precision, so that only the order of sums is left."""
    vlm, samples, batch = packed_batch()
    vlm.set_trainable(["vit", "connector", "decoder"], isolator=False)
    vlm.double()

    def gradient(batches: list) -> tuple[torch.Tensor, dict]:
        vlm.zero_grad()
        count = sum(len(b.student.targets) for b in batches)
        total = 0.0
        for b in batches:
            logits, _, _ = vlm(b)
            loss = F.cross_entropy(logits.double(), b.student.targets, reduction="sum") / count
            loss.backward()
            total += loss.detach()
        return total, {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}

    parts = [data.make_batch([sample], ["full"], vlm.cfg, 256, 256) for sample in samples]
    (packed, ours), (alone, theirs) = gradient([batch]), gradient(parts)
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    assert ours.keys() == theirs.keys()
    for name in ours:  # logits are rounded to float32 on their way
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-8, msg=name)


def test_nothing_is_learned_across_a_border_and_images_carry_no_loss():
    _, samples, batch = packed_batch()
    rows = batch.student
    into = rows.supervised + 1
    doc_ids, slot = rows.doc_ids.flatten(), rows.slot_mask.flatten()
    assert torch.equal(doc_ids[rows.supervised], doc_ids[into]) and not slot[into].any()
    texts = sum(len(p[0]) for pieces, _ in samples for p in pieces if not isinstance(p, int) and p[1])
    first = sum(not isinstance(pieces[1], int) and pieces[1][1] for pieces, _ in samples)  # has no context
    assert len(rows.targets) == texts - first


# ---------------------------------------------------------------------------------------------------------
# The plan


def test_shapes_are_the_same_in_every_step():
    plan = small_plan(pad_images=True, row_images=4)
    for batch in draw(plan):
        rows = batch.student
        assert rows.ids.shape == (6, 128) and len(batch.pixels) == 24
        assert len(rows.starts) == 6 * 10 + 1 and rows.starts[-1] == 6 * 128
        assert torch.equal(rows.starts, rows.starts.sort().values)
        begins = rows.positions.flatten() == 0
        begins[1:] &= rows.doc_ids.flatten()[1:] != rows.doc_ids.flatten()[:-1]
        assert len(rows.starts.unique()) - 1 == begins.sum()  # padding is a document of its own


def test_rows_hold_one_kind_and_no_more_images_than_allowed():
    plan = small_plan(range(20), row_images=3)
    for planned in plan:
        for row in planned.rows:
            kinds = {plan.record(place).kind for place in row}
            parts = [plan.parts(place)[1][place.part][0] for place in row]
            assert len(kinds) == 1 and sum(isinstance(p, int) for part in parts for p in part) <= 3
        assert abs(sum(planned.kinds.values()) - 1) < 1e-9 and 0 < planned.images <= 1
    mixed = small_plan(range(20), by_kind=False)
    assert any(len({mixed.record(p).kind for p in row}) > 1 for x in mixed for row in x.rows)


def test_kinds_are_drawn_by_weight_and_always_in_the_same_order():
    """MM1's 45 / 45 / 10 over 100,000 rows, within three standard deviations."""

    def drawn(seed: int) -> bytes:
        order = data.SampleOrder([1, 1, 1], [0.45, 0.45, 0.1], seed)
        return bytes(order.source(n) for n in range(100_000))

    kinds = drawn(0)
    for kind, share in enumerate((0.45, 0.45, 0.1)):
        assert abs(kinds.count(kind) / 1e5 - share) < 3 * (share * (1 - share) / 1e5) ** 0.5
    assert hashlib.sha256(kinds).hexdigest() == hashlib.sha256(drawn(0)).hexdigest() and drawn(1) != kinds
    assert kinds[:9].hex() == "010000000102010101"  # of NumPy's generator: the same on every machine


def test_long_documents_go_on_in_the_next_part_and_lose_nothing():
    plan = small_plan(row_length=64, row_images=2)
    for number in range(30):
        record, parts = plan.parts(plan.place(1, number))  # interleaved
        parts = [part for part, _, _ in parts]
        whole = data.pieces_of(record, TOKENIZER)
        assert record.kind == "interleaved"

        def text(pieces: list) -> list[int]:
            return [i for p in pieces if not isinstance(p, int) for i in p[0]]

        assert text(whole) == [i for part in parts for i in text(part)]
        assert [p for p in whole if isinstance(p, int)] == [
            p for part in parts for p in part if isinstance(p, int)
        ]
        for part in parts:
            assert len(data.lay_out(part, [np.arange(8)] * 9).ids) <= 64
    sizes = [{len(plan.parts(plan.place(group, n))[1]) for n in range(30)} for group in (0, 1)]
    assert sizes[0] == {1} and max(sizes[1]) > 1  # a caption is cut, a document goes on


def test_a_picture_of_a_document_stays_with_its_text():
    picture, text = [np.arange(8)] * 3, ([5] * 10, True)
    pieces = [0, text, 1, text, 2, text]
    assert data.split(pieces, picture, 30, together=True) == [pieces[:2], pieces[2:4], pieces[4:]]
    assert data.split(pieces, picture, 30)[0] == [0, text, 1, ([5] * 4, True)]
    long = [0, ([5] * 40, True)]  # fits nowhere: it begins where it is
    assert data.split(long, picture, 30, together=True) == [[0, ([5] * 22, True)], [([5] * 18, True)]]


def test_every_sample_of_a_pool_is_in_one_row():
    plan = small_plan(range(200), kinds=[("caption", 1.0)])
    seen = Counter(p.number for planned in plan for row in planned.rows for p in row)
    assert set(seen.values()) == {1} and {*range(data.Plan.POOL)} <= seen.keys()


def test_ranks_micro_steps_and_workers_share_the_same_rows():
    def rows(**changes) -> list:
        plan = small_plan(**changes)
        loader = torch.utils.data.DataLoader(
            data.Stream(plan), None, sampler=plan, num_workers=changes.get("w", 0)
        )
        return [batch.student.ids[b].tolist() for batch in loader for b in range(len(batch.student.ids))]

    whole = rows()
    assert sorted(whole) == sorted(rows(world=2) + rows(world=2, rank=1))
    assert whole == rows(micro_steps=3)
    plan = small_plan()
    planner = torch.utils.data.DataLoader(plan, None, num_workers=1)
    loader = torch.utils.data.DataLoader(data.Stream(plan), None, sampler=planner, num_workers=2)
    assert [b.student.ids.tolist() for b in loader] == [b.student.ids.tolist() for b in draw(plan)]


@pytest.mark.parametrize("first", [1, 17, 60])
def test_a_plan_goes_on_at_its_cursor(first):
    whole = [*small_plan(range(90))]
    rest = [*small_plan(range(first, 90), cursor=whole[first - 1].cursor)]
    assert [p.rows for p in whole[first:]] == [p.rows for p in rest]
    assert whole[-1].cursor[0][0] > 0  # more than one pool was used up


def test_modes_are_drawn_before_packing():
    """A fast sample takes its pruned length, a slow one has a row of the teacher's as well."""
    modes = ["fast", "fast", "slow"]
    plan = small_plan(by_kind=False, kinds=[("chat", 1.0)], choose_mode=lambda n: modes[n % 3])
    cfg, slow = plan.cfg, 0
    for planned in plan:
        batch = data.Stream(plan)[planned]
        places = [place for row in planned.rows for place in row]
        assert [place.mode for place in places] == [modes[place.number % 3] for place in places]
        for i, place in enumerate(places):
            slots = batch.student.slot_mask[batch.student.doc_ids == i].sum()
            assert slots == cfg.visual_tokens("full" if place.mode == "slow" else "pruned")
        slow += batch.teacher is not None
        if batch.teacher is not None:
            assert batch.teacher.ids.shape[1] == 128 and batch.student.ids.shape == (6, 128)
            assert torch.equal(batch.student.targets[batch.distill], batch.teacher.targets)
    assert slow


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("stage", [train_pretrain, train_sft])
def test_a_packed_run_resumes_exactly(stage, tmp_path, monkeypatch, small_halves):
    flags = [*test_training.SMALL, *small_halves, *"--batch_size 0 --rows 4 --steps 8 --save_every 4".split()]
    flags += ["--slow_share", "0.5"] if stage is train_sft else ["--micro_steps", "2"]
    test_training.run_stage(stage, [*flags, "--out", str(tmp_path / "whole")], None, monkeypatch)
    with pytest.raises(test_training.Killed):
        test_training.run_stage(stage, [*flags, "--out", str(tmp_path / "cut")], 6, monkeypatch)
    with pytest.raises(model.UserError, match="--rows 4"):
        stage.main([*flags, "--rows", "8", "--out", str(tmp_path / "cut"), "--resume", "auto"])
    test_training.run_stage(
        stage, [*flags, "--out", str(tmp_path / "cut"), "--resume", "auto"], None, monkeypatch
    )
    a, b = ((tmp_path / run / "step-00000008" / "model.safetensors").read_bytes() for run in ("whole", "cut"))
    assert a == b


def test_the_log_tells_shares_fill_and_validation_by_kind(tmp_path, small_halves):
    flags = [*test_training.SMALL, *small_halves, *"--batch_size 0 --rows 4 --steps 3 --eval_every 3".split()]
    train_pretrain.main([*flags, "--out", str(tmp_path / "a")])
    log = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for line in log[:3]:
        shares = [value for name, value in line.items() if name.startswith("share ")]
        assert (
            sum(shares) == pytest.approx(1, abs=1e-4) and 0.5 < line["fill"] <= 1 and line["image_fill"] > 0
        )
    kinds = {name for name in log[3] if name.startswith("val_loss ")}
    assert kinds == {f"val_loss {kind}" for kind in ("caption", "chat", "interleaved", "text")}
    shares = dict(data.SCENES_MIX["pretrain"])
    mean = sum(shares[kind] * log[3][f"val_loss {kind}"] for kind in shares) / sum(shares.values())
    assert log[3]["val_loss"] == pytest.approx(mean, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [train_pretrain, train_sft])
def test_packed_rows_compile_once(stage, tmp_path, small_halves, monkeypatch):
    """After the first step no shape is new, with teachers or after a validation either: torch would raise."""
    real = train_pretrain.optimizer_step

    def strict(run, ddp, micro, optimizers, step, loss_of):
        with torch._dynamo.config.patch(error_on_recompile=step >= 1):
            return real(run, ddp, micro, optimizers, step, loss_of)

    torch._dynamo.reset()
    monkeypatch.setattr(stage, "optimizer_step", strict)
    flags = "--batch_size 0 --rows 4 --steps 8 --compile true --eval_every 3 --train vit,connector,decoder"
    flags = [*test_training.SMALL, *small_halves, *flags.split()]
    flags += ["--slow_share", "0.3"] if stage is train_sft else []
    stage.main([*flags, "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "latest").is_file()


# ---------------------------------------------------------------------------------------------------------
# CUDA's kernel for documents


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
    out = model.attend(q.float(), k.float(), v, model.Documents(rows.starts.to("meta"), 256))
    assert out.shape == q.shape and {x.dtype for x in seen[0]} == {torch.bfloat16}
    assert [tuple(x.shape) for x in seen[0]] == [(512, 4, 32), (512, 2, 32), (512, 2, 32)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a cuda device")
def test_the_document_kernel_agrees_with_the_mask():
    rows, *inputs = documents("cuda", torch.bfloat16)
    results = []
    for mask in (model.Documents(rows.starts.cuda(), 256), model.document_mask(rows.doc_ids.cuda())):
        out = model.attend(*inputs, mask)
        real = (rows.doc_ids >= 0).cuda()[:, None, :, None]
        grads = torch.autograd.grad((out.float() * real).square().sum(), inputs)
        results.append([out * real, *grads])
    for kernel, masked in zip(*results):
        torch.testing.assert_close(kernel.float(), masked.float(), rtol=2e-2, atol=2e-2)


def test_starts_are_where_the_mask_changes():
    """The two forms say the same: positions attend within [start, next start)."""
    _, _, batch = packed_batch()
    rows = batch.student
    place = torch.searchsorted(rows.starts, torch.arange(rows.ids.numel(), dtype=torch.int32), right=True)
    place = place.view(rows.ids.shape)
    same = place[:, :, None] == place[:, None]
    T = rows.ids.shape[1]
    assert torch.equal(
        same & torch.ones(T, T, dtype=torch.bool).tril(), model.document_mask(rows.doc_ids)[:, 0]
    )


def test_a_sample_without_room_for_its_answer_is_left_out_and_counted():
    plan = small_plan(range(1), kinds=[("chat", 1.0)], row_length=15, batch_rows=2)
    planned = next(iter(plan))
    places = [plan.place(0, n) for n in range(plan.POOL)]
    assert 0 < sum(not plan.parts(place)[1] for place in places) <= len(planned.skipped)
    assert {why for why, _ in planned.skipped} == {"no answer within the limit"}
    assert "no answer is left within 15 positions" in planned.skipped[0][1]
    others = [plan.usable(place, []) for place in places]  # another record takes the place
    assert all(plan.parts(place)[1] for place in others)
    with pytest.raises(model.UserError, match="raise --row_limit"):
        small_plan(row_length=8)


def test_pictures_must_fit_into_a_row(tmp_path, small_halves):
    cfg = test_training.small_config()
    cfg.image.cut = "split"  # five views of 8 tokens
    for changes, words in (
        ({"row_images": 4}, "raise --row_images"),
        ({"row_length": 40}, "raise --row_limit"),
    ):
        fixed = {"row_length": 128} | changes
        with pytest.raises(model.UserError, match=words):
            data.Plan(
                [(data.Scenes("caption"), 1.0)], TOKENIZER, cfg, lambda n: "full", 0, range(1), 2, **fixed
            )
    flags = [*test_training.SMALL, *small_halves, *"--batch_size 0 --rows 2 --row_images 4".split()]
    with pytest.raises(model.UserError, match="5 views, a row takes 4"):
        train_pretrain.main(
            [*flags, "--row_length", "512", "--resolution", "+split", "--out", str(tmp_path / "a")]
        )
    assert not (tmp_path / "a").exists()


def test_teachers_longer_than_their_students_fit_too():
    """Keeping all tokens behind an isolator takes more positions than not pruning at all."""
    cfg = test_training.small_config(prune=model.PruneConfig(keep=1.0, isolator=2))
    source = data.Scenes("chat")
    plan = data.Plan([(source, 1.0)], TOKENIZER, cfg, lambda n: "slow", 0, range(8), 4, row_length=96)
    for planned in plan:
        batch = data.Stream(plan)[planned]
        assert batch.teacher.ids.shape[1] == 96 and len(batch.distill) == len(batch.teacher.targets)


def test_many_short_documents_keep_the_shapes():
    short = Lengths([3] * 600, False)
    cfg = test_training.small_config()
    plan = data.Plan([(short, 1.0)], Words(), cfg, lambda n: "full", 0, range(3), 2, row_length=128)
    for planned in plan:
        batch = data.Stream(plan)[planned]
        assert len(batch.student.starts) == 2 * (128 // 16 + 2) + 1 and max(map(len, planned.rows)) == 8


def test_a_source_of_weight_0_is_never_drawn(recwarn):
    plan = small_plan(range(20), kinds=[("caption", 1.0), ("text", 0.0)])
    assert {plan.record(place).kind for planned in plan for row in planned.rows for place in row} == {
        "caption"
    }
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_every_text_that_goes_on_has_something_to_learn():
    """A text of one token more than a row would leave its end token alone, with nothing to tell it from."""

    class Texts(Lengths):
        def __getitem__(self, i: int) -> data.Record:
            return data.Record("text", super().__getitem__(i).parts, [])

    cfg = test_training.small_config()
    source = Texts([129, 257, 300, 40], False)
    plan = data.Plan([(source, 1.0)], Words(), cfg, lambda n: "full", 0, range(1), 2, row_length=128)
    parts = [plan.parts(plan.place(0, n))[1] for n in range(4)]
    assert sorted(len(each) for each in parts) == [1, 1, 2, 3]


def test_resume_refuses_what_changes_lengths(tmp_path, small_halves):
    flags = [*test_training.SMALL, *small_halves, *"--batch_size 0 --rows 4 --steps 1".split()]
    train_sft.main([*flags, "--out", str(tmp_path / "a")])
    again = [*flags, "--out", str(tmp_path / "a"), "--resume", "auto", "--steps", "2"]
    for name, value in (("slow_share", "0.5"), ("prune.keep", "0.75"), ("row_images", "8")):
        with pytest.raises(model.UserError, match=f"trained with --{name}"):
            train_sft.main([*again, f"--{name}", value])
    state = model.find_step(tmp_path / "a") / "state.pt"
    old = torch.load(state, weights_only=True)
    del old["order"], old["cursor"]
    torch.save(old, state)
    with pytest.raises(model.UserError, match="older version"):
        train_sft.main(again)
