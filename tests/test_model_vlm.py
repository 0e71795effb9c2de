"""The VLM on small random weights: generation, saving and loading, packed rows, control words in text."""

import pytest
import torch
from helpers import TOKENIZER, tiny_vlm
from torch.testing import assert_close

import data
import model
from model import UserError


def prompts() -> list[tuple[list, torch.Tensor]]:
    """Two pictures in a dialogue, one and a long question, no picture, one and a short question."""
    questions = [
        ("how many?", 2, [("hello", "there it is")]),
        ("is there any red star to the left of the word?", 1, []),
        ("no picture at all", 0, []),
        ("what is this?", 1, []),
    ]
    samples = []
    for n, (text, images, history) in enumerate(questions):
        scenes = [data.make_scene("train", 10 * n + i) for i in range(images)]
        pieces = data.prompt_pieces(text, images, TOKENIZER, history)
        samples.append((pieces, data.load_images(scenes, tiny_vlm().cfg)))
    return samples


def greedy(vlm: model.VLM, sample: tuple, mode: str, steps: int) -> list[int]:
    """Arg max of a full forward of this one sample, over and over: no cache, no batch."""
    pieces, new = sample[0], []
    for _ in range(steps):
        batch = data.prompt_batch([([*pieces, (new, False)], sample[1])], mode, vlm.cfg)
        rows = batch.student
        x = vlm.splice(rows, vlm.bank(batch))
        hidden, _ = vlm.decoder.hidden(x, rows.positions, model.document_mask(rows.doc_ids))
        new = [*new, vlm.decoder.head(hidden[0, -1]).argmax().item()]
    return new


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "pruned"])
def test_generate_is_the_arg_max_of_full_forwards(mode):
    vlm, samples = tiny_vlm(), prompts()
    expected = [greedy(vlm, sample, mode, 8) for sample in samples]
    assert len(set(map(tuple, expected))) == 4 and len(set(sum(expected, []))) > 12  # a test worth its name
    batch = data.prompt_batch(samples, mode, vlm.cfg)
    assert batch.student.slot_mask.sum(1).tolist() == [n * (8 if mode == "full" else 5) for n in (2, 1, 0, 1)]
    never = TOKENIZER.vocab_size  # an id that no arg max takes
    assert vlm.generate(batch, never, 8) == expected
    end = expected[1][2]  # now one row ends early, and perhaps others
    stopped = [row[: row.index(end)] if end in row else row for row in expected]
    assert vlm.generate(batch, end, 8) == stopped and len(stopped[1]) < 3
    sampled = [vlm.generate(batch, never, 8, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def samples_of_scenes() -> list[tuple[list, torch.Tensor]]:
    records = [data.Scenes("chat")[i] for i in range(3)]
    return [(data.pieces_of(r, TOKENIZER), data.load_images(r.images, tiny_vlm().cfg)) for r in records]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_gives_the_same_logits(tied, tmp_path):
    vlm = tiny_vlm(tied)
    vlm.save_pretrained(tmp_path / "step-00000005")
    (tmp_path / "latest").write_text("step-00000005\n")
    batch = data.make_batch(samples_of_scenes(), ["slow", "pruned", "full"], vlm.cfg, 256, 250)
    expected = vlm(batch)
    assert expected[0].shape == (len(batch.student.targets), TOKENIZER.vocab_size)
    assert expected[1].shape == (len(batch.distill), TOKENIZER.vocab_size)
    for path in (tmp_path, tmp_path / "step-00000005"):  # a run folder, a step folder
        again = model.VLM.from_pretrained(path)
        assert again.cfg == vlm.cfg
        for actual, desired in zip(again(batch)[:2], expected[:2]):
            assert torch.equal(actual, desired)
    with pytest.raises(UserError, match=f"{tmp_path}/nothing is neither a run folder"):
        model.VLM.from_pretrained(tmp_path / "nothing")


@torch.no_grad()
def test_packing_and_mode_do_not_change_a_samples_logits():
    """A packed sample gives what it gives alone, in each mode; the slow mode's teacher is the fast mode."""
    vlm, samples, modes = tiny_vlm(), samples_of_scenes(), ["slow", "pruned", "full"]
    packed = data.make_batch(samples, modes, vlm.cfg, 1024, 250)
    assert len(packed.student.ids) == 1  # one row
    student, teacher, _ = vlm(packed)
    alone = [vlm(data.make_batch([s], [m], vlm.cfg, 64, 250))[0] for s, m in zip(samples, modes)]
    order = packed.student.doc_ids.flatten()[packed.student.supervised]  # whose each logit is
    for i in range(3):
        assert_close(student[order == i], alone[i], rtol=0, atol=1e-4)
    fast = vlm(data.make_batch(samples[:1], ["pruned"], vlm.cfg, 64, 250))[0]
    assert_close(teacher, fast, rtol=0, atol=1e-4)
    assert (order[packed.distill] == 0).all() and not torch.allclose(teacher, alone[0], atol=1e-2)
