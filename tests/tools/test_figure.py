"""The figure of the architecture: its size, its bytes, and that its numbers are the config's."""

import pytest
from PIL import Image

import model
from tools import figure


def test_two_runs_draw_the_same_bytes(tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    figure.main([str(first)])
    figure.main([str(second)])
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 250_000
    with Image.open(first) as picture:
        assert picture.size == (2 * figure.WIDTH, 2 * figure.HEIGHT)
        colours = {colour for _, colour in picture.convert("RGB").getcolors()}
    for colour in ("#8250df", "#1a7f37", "#1f5fd0", "#e36209"):  # isolator, answer, both scales of stage 1
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert min(max(abs(a - b) for a, b in zip(rgb, drawn)) for drawn in colours) <= 8


def test_labels_are_the_configs():
    recipe = model.preset("tiny")
    stages = recipe["model"], model.scaled_config(recipe["model"], recipe["scale"])
    first, second = (figure.labels(cfg) for cfg in stages)
    assert first["sum"] == "16 + 16 = 32 visual tokens, coarse to fine"
    assert second["sum"] == "16 + 64 + 64 = 144 visual tokens, coarse to fine"
    assert first["patches"] == "64 px,\n8 x 8 patches" and second["patches"] == "128 px,\n16 x 16 patches"
    assert [first[f"below {i}"] for i in (0, 1)] == ["1 window,\n16 queries", "4 x 4 windows,\n1 query each"]
    assert second["below 1"] == "2 x 2 windows,\n16 queries each"
    assert second["above 2"] == "scale 3: 64 tokens" and second["below 2"] == "8 x 8 windows,\n1 query each"
    assert second["slow"] == "1 of 10 samples,\nall 144 tokens"
    assert second["fast"] == "9 of 10 samples,\n36 of 144 tokens"
    assert second["isolator"].startswith("4 isolator tokens")
    cfg = model.copy_config(stages[0])
    cfg.connector.windows, cfg.connector.queries, cfg.connector.levels = [8, 4], [4, 9], [1, 2, 4]
    cfg.prune.keep, cfg.prune.isolator = 10, 2
    text = figure.labels(cfg)
    assert text["sum"] == "4 + 36 = 40 visual tokens, coarse to fine"
    assert text["below 1"] == "2 x 2 windows,\n9 queries each"
    assert text["levels"] == "hidden states\nof 3 layers"
    assert text["fast"].endswith("10 of 40 tokens") and text["isolator"].startswith("2 isolator tokens")


def test_colours_and_columns_fit_the_scaling():
    """A scale of stage 2 stands below its source or on either side of it; its first heir has its colour."""
    sources = [source for source, _ in model.read_scaling(model.preset("tiny")["scale"])[1]]
    assert len(figure.PANELS_2) == len(figure.COLOURS_2) == len(sources)
    for source, x in enumerate(figure.PANELS_1):
        heirs = [scale for scale, ancestor in enumerate(sources) if ancestor == source]
        assert figure.COLOURS_2[heirs[0]] == figure.COLOURS_1[source]
        assert x == pytest.approx(sum(figure.PANELS_2[scale] for scale in heirs) / len(heirs), abs=1)
