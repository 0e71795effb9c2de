"""Draws the architecture for the README: `python tools/figure.py [OUT]` (default assets/architecture.png).

The picture and its words come from the built-in world; windows, queries, token counts and the share of slow
samples from the preset "tiny" and the defaults of train_sft.py, so that the figure agrees with the code. Only
Pillow draws, with the font that it carries, and the same code gives the same bytes.
"""

import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import train_sft

# Layout. One unit is a pixel of a README that is 1000 wide; drawn at four pixels a unit, delivered at two.
WIDTH, HEIGHT, DRAWN = 1000, 896, 4
STAGE_1, STAGE_2, SPEEDS = (16, 300), (346, 630), (660, 880)  # top and bottom of each band
LEFT, VIT_X, CHAIN_X, RIGHT_X = 32, 188, 288, 776  # left edges of the columns
PANEL, VIT_WIDTH, CHAIN_WIDTH, RIGHT_WIDTH = 130, 64, 464, 192
PANELS_1, PANELS_2, PANEL_DOWN = (379, 606), (304, 455, 606), 72  # left edges of the scales, down from a band
SEQUENCE_X, DECODER_X, DECODER_WIDTH = 172, 674, 84  # of the two speeds
TOKEN, TOKEN_ROWS = 8, 4  # a sequence of visual tokens is drawn in columns of four
TITLE, NORMAL, SMALL = 21, 15, 13.5  # sizes of text

INK, GREY, LINE, BAND = "#1f2328", "#59636e", "#7d8792", "#f1f4f8"
COLOURS_1, COLOURS_2 = ("#1f5fd0", "#e36209"), ("#1f5fd0", "#84a6e4", "#e36209")  # of the scales
ISOLATOR, ANSWER, QUESTION, DARK = "#8250df", "#1a7f37", "#d8dee6", "#39424e"
SCENE, QUESTION_SEED = data.make_scene("train", 1877), 6  # few colours; the draw that asks for the red ring


class Canvas:
    """Pillow's pen, in units of the layout."""

    def __init__(self):
        self.picture = Image.new("RGB", (WIDTH * DRAWN, HEIGHT * DRAWN), "white")
        self.pen = ImageDraw.Draw(self.picture)

    def box(self, x, y, width, height, fill=None, outline=None, radius=0):
        corners = [round(v * DRAWN) for v in (x, y, x + width, y + height)]
        self.pen.rounded_rectangle(corners, radius * DRAWN, fill, outline, DRAWN)

    def text(self, x, y, words, size=SMALL, fill=INK, anchor="lm", bold=False):
        """anchor: "lm" starts at x, "mm" is centred there; y is the middle."""
        font, align = ImageFont.load_default(size * DRAWN), "left" if anchor == "lm" else "center"
        where, spacing, stroke = (x * DRAWN, y * DRAWN), 0.35 * size * DRAWN, 0.25 * DRAWN * bold
        self.pen.multiline_text(where, words, fill, font, anchor, spacing, align, stroke_width=stroke)

    def arrow(self, *points, fill=LINE):
        """Straight pieces, the last of which is horizontal or vertical."""
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        neck = (x1 - 7 * dx, y1 - 7 * dy)
        self.pen.line([(x * DRAWN, y * DRAWN) for x, y in (*points[:-1], neck)], fill, 2 * DRAWN + 1, "curve")
        head = [(neck[0] - 5 * dy, neck[1] + 5 * dx), (x1, y1), (neck[0] + 5 * dy, neck[1] - 5 * dx)]
        self.pen.polygon([(x * DRAWN, y * DRAWN) for x, y in head], fill)

    def grid(self, x, y, cells, fill, line):
        """Lines that cut a panel into cells x cells."""
        low, high, width = -line / 2, PANEL + line / 2, round(line * DRAWN)
        for i in range(cells + 1):
            offset = PANEL * i / cells
            self.pen.line([v * DRAWN for v in (x + offset, y + low, x + offset, y + high)], fill, width)
            self.pen.line([v * DRAWN for v in (x + low, y + offset, x + high, y + offset)], fill, width)

    def patches(self, x, y, picture: Image.Image, cells):
        picture = picture.resize((PANEL * DRAWN, PANEL * DRAWN), Image.Resampling.NEAREST)
        self.picture.paste(picture, (x * DRAWN, y * DRAWN))
        self.grid(x, y, cells, "white", 0.5)

    def sequence(self, x, y, colours: list, texts: dict[str, str]) -> float:
        """Visual tokens column by column, then texts (words: fill), centred at y; returns the right edge."""
        for i, colour in enumerate(colours):
            column, row = divmod(i, TOKEN_ROWS)
            left, top = x + TOKEN * column, y + TOKEN * (row - TOKEN_ROWS / 2)
            self.box(left, top, TOKEN - 1.5, TOKEN - 1.5, colour)
        x = left + TOKEN + 3
        for words, fill in texts.items():
            width = ImageFont.load_default(NORMAL * DRAWN).getlength(words) / DRAWN + 14
            self.box(x, y - 16, width, 31, fill, radius=5)
            self.text(x + 7, y, words, NORMAL, "white" if fill == ANSWER else INK)
            x += width + 4
        return x


def labels(cfg: model.ModelConfig) -> dict[str, str]:
    """All text with numbers in it, of one stage."""
    slow = round(10 * train_sft.SftConfig().slow_share)
    full, counts = cfg.visual_tokens("full"), cfg.scale_tokens()
    text = {
        "patches": f"{cfg.vit.image_size} px,\n{cfg.side} x {cfg.side} patches",
        "levels": f"hidden states\nof {len(cfg.connector.levels)} layers",
        "sum": f"{' + '.join(map(str, counts))} = {full} visual tokens, coarse to fine",
        "slow": f"{slow} of 10 samples,\nall {full} tokens",
        "fast": f"{10 - slow} of 10 samples,\n{cfg.kept_tokens()} of {full} tokens",
        "isolator": f"{cfg.prune.isolator} isolator tokens announce the fast mode",
    }
    for scale, (window, queries) in enumerate(cfg.scales()):
        n, noun = cfg.side // window, "query" if queries == 1 else "queries"
        windows, ending = (f"{n} x {n} windows", " each") if n > 1 else ("1 window", "")
        text[f"above {scale}"] = f"scale {scale + 1}: {counts[scale]} tokens"
        text[f"below {scale}"] = f"{windows},\n{queries} {noun}{ending}"
    return text


def draw_vit(canvas: Canvas, cfg: model.ModelConfig, y):
    """Layers from bottom to top, and arrows from those whose hidden states are read."""
    middle = VIT_X + VIT_WIDTH / 2
    canvas.box(VIT_X, y, VIT_WIDTH, PANEL, "white", LINE, 6)
    canvas.text(middle, y + 15, "ViT", NORMAL, anchor="mm", bold=True)
    height = (PANEL - 32) / cfg.vit.layers
    for layer in range(1, cfg.vit.layers + 1):
        top = y + PANEL - 3 - height * layer
        fill, ink = (DARK, "white") if layer in cfg.connector.levels else (QUESTION, GREY)
        canvas.box(VIT_X + 5, top, VIT_WIDTH - 10, height - 3, fill, radius=3)
        canvas.text(middle, top + height / 2 - 1.5, f"layer {layer}", 12.5, ink, "mm")
        if layer in cfg.connector.levels:
            canvas.arrow((VIT_X + VIT_WIDTH, top + height / 2), (CHAIN_X, top + height / 2))


def draw_scale(canvas: Canvas, cfg: model.ModelConfig, scale: int, x, y, picture: Image.Image, colour):
    """The patches cut into one scale's windows, and in every window its queries, a square number."""
    window, queries = cfg.scales()[scale]
    n_windows = cfg.side // window  # in a row, as all counts here
    n_queries = n_windows * round(queries**0.5)
    pitch = PANEL / n_queries
    square = min(10, 0.5 * pitch)
    margin = (pitch - square) / 2
    canvas.patches(x, y, Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.4), cfg.side)
    canvas.grid(x, y, n_windows, colour, max(1, 3 - n_windows / 4))
    for row, column in np.ndindex(n_queries, n_queries):
        canvas.box(x + column * pitch + margin, y + row * pitch + margin, square, square, colour)


def draw_stage(canvas: Canvas, cfg: model.ModelConfig, band, title: str, panels, colours):
    """Picture, encoder and the windows of all scales, left to right."""
    y, picture, text = band[0] + PANEL_DOWN, data.render(SCENE, cfg.vit.image_size), labels(cfg)
    canvas.text(LEFT, band[0] + 26, title, TITLE, bold=True)
    canvas.patches(LEFT, y, picture, cfg.side)
    canvas.text(LEFT + PANEL / 2, y + PANEL + 26, text["patches"], anchor="mm")
    canvas.arrow((LEFT + PANEL, y + PANEL / 2), (VIT_X, y + PANEL / 2))
    draw_vit(canvas, cfg, y)
    canvas.text(VIT_X + VIT_WIDTH / 2, y + PANEL + 26, text["levels"], anchor="mm")
    canvas.box(CHAIN_X, band[0] + 10, CHAIN_WIDTH, band[1] - band[0] - 20, "white", LINE, 8)
    for scale, x in enumerate(panels):
        draw_scale(canvas, cfg, scale, x, y, picture, colours[scale])
        canvas.text(x + PANEL / 2, y - 13, text[f"above {scale}"], anchor="mm", bold=True)
        canvas.text(x + PANEL / 2, y + PANEL + 26, text[f"below {scale}"], anchor="mm")
    canvas.text(CHAIN_X + CHAIN_WIDTH / 2, band[1] - 26, text["sum"], NORMAL, anchor="mm", bold=True)


def draw_pretraining(canvas: Canvas, cfg: model.ModelConfig):
    """What the decoder reads in stage 1, and which of it is supervised."""
    y, middle, top = STAGE_1[0] + PANEL_DOWN + PANEL / 2, RIGHT_X + RIGHT_WIDTH / 2, STAGE_1[0] + 40
    canvas.text(CHAIN_X + 16, STAGE_1[0] + 30, "Chain-of-Sight", NORMAL, bold=True)
    canvas.text(CHAIN_X + 126, STAGE_1[0] + 30, "a learned query (square) turns its window into a token")
    canvas.arrow((CHAIN_X + CHAIN_WIDTH, y), (RIGHT_X, y))
    caption, colours = data.say(SCENE).split(",")[0] + " ...", np.repeat(COLOURS_1, cfg.scale_tokens())
    canvas.sequence(RIGHT_X + 2, y, colours.tolist(), {caption: ANSWER})
    canvas.box(RIGHT_X, top, RIGHT_WIDTH, 50, DARK, radius=6)
    canvas.text(middle, top + 25, "Decoder\n(language model)", NORMAL, "white", "mm", bold=True)
    canvas.arrow((middle, y - 20), (middle, top + 52))
    canvas.text(middle, y + 44, "visual tokens, then a caption;\ngreen: what it learns to say", anchor="mm")


def draw_inflation(canvas: Canvas, scaling: str):
    """Arrows from the scales of stage 1 to those of stage 2 that start from them."""
    start, turn, end = STAGE_1[1] - 10, (STAGE_1[1] + STAGE_2[0]) / 2, STAGE_2[0] + PANEL_DOWN - 24
    for scale, (source, _) in enumerate(model.read_scaling(scaling)[1]):
        x0, x1 = PANELS_1[source] + PANEL / 2, PANELS_2[scale] + PANEL / 2
        canvas.arrow((x0, start), (x0, turn), (x1, turn), (x1, end), fill=COLOURS_1[source])
    canvas.text(RIGHT_X, STAGE_2[0] + 120, "Parameter inflation", NORMAL, bold=True)
    canvas.text(RIGHT_X, STAGE_2[0] + 153, "weights and queries of a scale\nare copied along its arrow")


def draw_speeds(canvas: Canvas, cfg: model.ModelConfig):
    """The sequences of both modes, the decoder that reads them, and their losses."""
    slow, middle, fast, right_x = *(SPEEDS[0] + down for down in (82, 122, 162)), DECODER_X + DECODER_WIDTH
    full, text = np.repeat(COLOURS_2, cfg.scale_tokens()).tolist(), labels(cfg)
    sample = data.ask(SCENE, "what", random.Random(QUESTION_SEED), "train")
    kept = sorted(random.Random(0).sample(full, cfg.kept_tokens()), key=full.index)
    pruned = [ISOLATOR] * cfg.prune.isolator + kept
    canvas.text(LEFT, SPEEDS[0] + 26, "DualSpeed in stage 2", TITLE, bold=True)
    canvas.box(DECODER_X, slow - 30, DECODER_WIDTH, fast - slow + 60, DARK, radius=6)
    canvas.text(DECODER_X + DECODER_WIDTH / 2, middle, "Decoder", NORMAL, "white", "mm", bold=True)
    for name, y, tokens in (("slow", slow, full), ("fast", fast, pruned)):
        canvas.text(LEFT, y - 18, name, NORMAL, bold=True)
        canvas.text(LEFT, y + 12, text[name])
        right = canvas.sequence(SEQUENCE_X, y, tokens, {sample.question: QUESTION, sample.answer: ANSWER})
        canvas.arrow((right, y), (DECODER_X, y))
        canvas.arrow((right_x, y), (right_x + 22, y))
        canvas.text(right_x + 28, y, "learns the answer")
    canvas.arrow((CHAIN_X + 40, STAGE_2[1] - 10), (CHAIN_X + 40, slow - 18))
    canvas.arrow((SEQUENCE_X + 40, slow + 18), (SEQUENCE_X + 40, fast - 18))
    canvas.text(SEQUENCE_X + 52, middle, "prune")
    canvas.text(SEQUENCE_X, fast + 32, text["isolator"], SMALL, ISOLATOR)
    canvas.arrow((right_x + 38, fast - 12), (right_x + 38, slow + 12), fill=ISOLATOR)
    canvas.text(right_x + 48, middle, "self-distillation:\nKL to the fast prediction", SMALL, ISOLATOR)


def main(argv: list[str]) -> None:
    model.parse_cli([word for word in argv if word.startswith("-")], __doc__)  # --help, and no other flags
    recipe, canvas = model.preset("tiny"), Canvas()
    first, second = recipe["model"], model.scaled_config(recipe["model"], recipe["scale"])
    for top, bottom in (STAGE_1, STAGE_2, SPEEDS):
        canvas.box(16, top, WIDTH - 32, bottom - top, BAND, radius=10)
    draw_stage(canvas, first, STAGE_1, "Stage 1: pre-training", PANELS_1, COLOURS_1)
    draw_stage(canvas, second, STAGE_2, "Stage 2: fine-tuning", PANELS_2, COLOURS_2)
    draw_pretraining(canvas, first)
    draw_inflation(canvas, recipe["scale"])
    draw_speeds(canvas, second)
    out = argv[0] if argv else model.ASSETS / "architecture.png"
    canvas.picture.reduce(2).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(out, optimize=True)


if __name__ == "__main__":
    model.run_cli(main)
