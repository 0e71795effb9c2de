"""report.html: everything that a run has to show, on one page that opens offline.

    python tools/report.py runs/a/eval.json                      # writes runs/a/report.html
    python tools/report.py runs/a/eval.json --out page.html

Scores with their blind control, what the decoder sees after each pruner, examples with pictures and answers,
where the scales of Chain-of-Sight look before and after scaling, and the loss curves of the run and of the
one it came from. All of it comes from eval.json, from the run that it names, and from the pictures it names:
scenes are drawn anew, others are read from their files. Of eval.json without a run (the answers of others)
only scores and examples are shown.
"""

import base64
import contextlib
import html
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import prune
import train_pretrain
from model import UserError
from tools import benchmarks

LOSS = "nll_per_token"  # the metric that is no share of 100, and of which less is better


@dataclass
class ReportConfig:
    out: str = ""  # page to write; default: report.html beside eval.json
    inflation: bool = False  # also measure, on the CPU, the loss with random and with inflated new scales


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        argv = ["", *argv]
    path, cfg = Path(argv[0]), ReportConfig()
    model.parse_cli(argv[1:], __doc__, cfg)
    if not path.is_file():
        raise UserError("give an eval.json that eval.py wrote: python tools/report.py EVAL.json [--out PAGE]")
    out = Path(cfg.out) if cfg.out else path.with_name("report.html")
    if out.is_dir():
        raise UserError(f"--out {cfg.out} is a folder: give a file in it")
    make_report(out, model.read_json(path), cfg.inflation)
    print(f"report: {out}")


def make_report(path: Path, summary: dict, inflation: bool = False) -> None:
    """The page of an eval.json."""
    examples = []
    for example in summary.get("examples", []):
        picture = None
        with contextlib.suppress(data.BadRecord):  # a file that is gone
            picture = open_picture(example["picture"]) if example["picture"] else None
        examples.append({**example, "image": picture})
    pictures = [example["image"] for example in examples if example["image"]]
    facts = [("checkpoint", summary["model"] or "answers without a run"), ("commit", summary["commit"])]
    curves, overlays, scales = {}, [], []
    if summary["model"]:
        step = model.find_step(summary["model"])
        vlm = model.VLM.from_pretrained(step).eval()
        curves = read_curves(step)
        facts += run_facts_of(vlm, step, summary) + (inflation_facts(step) if inflation else [])
        overlays = draw_overlays(vlm, pictures[:1])
        scales = draw_scales(vlm, step, pictures[0]) if pictures else []
    write_report(path, "sightspeed report", facts, summary["results"], examples, curves, overlays, scales)


def open_picture(name: str) -> Image.Image | None:
    """The picture that eval.json names: "scene:test:17", a path, or "FILE#17", row 17 of a table."""
    if name.startswith("scene:"):
        _, split, number = name.split(":")
        return data.render(data.make_scene(split, int(number)))
    file, _, row = name.rpartition("#")
    if row.isdecimal() and Path(file).suffix in (".tsv", ".parquet"):
        raw, place = benchmarks.open_table(Path(file)).raw(int(row))
        return data.open_image(benchmarks.encoded_pictures(raw, {}, place)[0])
    return data.open_image(Path(name))


def run_facts_of(vlm, step: Path, summary: dict) -> list[tuple[str, str]]:
    seed = model.read_json(step / "config.json")["train"]["seed"]
    size, pruned = data.square_tokens(vlm.cfg), data.square_tokens(vlm.cfg, "pruned")
    return [
        ("seed of the run, of the questions", f"{seed}, {summary['seed']}"),
        ("prompt template, scoring", f"{summary['prompt']}, {summary['scoring']}"),
        ("visual tokens of an image", f"{size} full, {pruned} pruned (isolator included)"),
    ]


def read_curves(step: Path) -> dict[str, dict]:
    """Loss curves of a run and of those it came from, oldest first."""
    curves = {}
    folder = run_of(step)
    while folder and (folder / "metrics.jsonl").is_file():
        config = model.read_json(folder / "config.json")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        series = {}
        for name in ("ce" if config["stage"] == "sft" else "loss", "kl", "val_loss"):
            points = [(line["step"], line[name]) for line in lines if "step" in line and name in line]
            if points:
                series[name] = points
        curves = {f"{config['stage']}: {folder}": series, **curves}
        folder = run_of(Path(config["train"]["init"])) if config["train"]["init"] else None
    return curves


def inflation_facts(step: Path) -> list[tuple[str, str]]:
    """What parameter inflation is worth: the loss on stage-1 data of the model before its tokens were scaled
    up, and right after it, with random new scales and with inflated ones.
    """
    flags = model.read_json(step / "config.json")["train"]
    if not flags["scale"] or not Path(flags["init"]).exists():
        return []
    before = model.find_step(flags["init"])
    cfg = model.from_dict(train_pretrain.PretrainConfig, model.read_json(before / "config.json")["train"])
    cfg.dtype = "float32"
    run = train_pretrain.Run("pretrain", cfg, 0, 1, torch.device("cpu"))
    tokenizer, losses = data.Tokenizer.from_pretrained(before / "tokenizer"), []
    for scales in ("as it was", "random", "inflate"):
        vlm = model.VLM.from_pretrained(before).eval()
        torch.manual_seed(flags["seed"])
        if scales != "as it was":
            model.scale_up(vlm, flags["scale"], scales)
        loss = train_pretrain.validation_loss(run, vlm, tokenizer, cfg.data, "pretrain")["all"]
        losses.append(f"{scales} {loss:.3f}")
    return [(f"loss on stage-1 data when tokens grow ({flags['scale']})", ", ".join(losses))]


def run_of(path: Path) -> Path:
    """The run folder of a checkpoint."""
    return path.parent if path.name.startswith("step-") else path


# ---------------------------------------------------------------------------------------------------------
# The page. What comes from data or the model goes through `quote`, and the page's own policy forbids to run
# or to fetch anything. Canvas and CanvasText follow prefers-color-scheme.

quote = html.escape
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
DASHES = ("none", "6 3", "2 3", "9 3 2 3")  # together with the hue: no curve is told apart by colour alone
CSS = """
:root { color-scheme: light dark; --c0: #3b7fe0; --c1: #d0701f; --c2: #1f9483; --c3: #9560cc;
  --soft: color-mix(in srgb, CanvasText 65%, Canvas); --line: color-mix(in srgb, CanvasText 14%, Canvas) }
body { margin: 0 auto; max-width: 1000px; padding: 24px 20px 64px; background: Canvas; color: CanvasText;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 18px; margin: 40px 0 4px } b { font-weight: 600 }
p, small, dt, th, figcaption { color: var(--soft); font-size: 13px; margin: 0 } dl, dd, figure { margin: 0 }
.grid { display: grid; gap: 16px; margin-top: 14px } img, svg { display: block; width: 100% }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-top: 12px }
td, th { padding: 3px 0 3px 16px; white-space: nowrap; text-align: right; font-weight: normal }
.left { text-align: left; padding-left: 0 } td:has(.bar) { width: 40%; min-width: 160px }
.first td { border-top: 1px solid var(--line); padding-top: 8px } .part [rowspan] { padding-left: 20px }
[rowspan] { vertical-align: top; padding-right: 14px } .key { text-indent: -18px }
.key i { display: inline-block; margin: -3px 6px 0 18px; vertical-align: middle }
i { height: 12px; width: 22px; border-radius: 3px } .bar i { position: absolute; left: 0 }
.bar { height: 12px; border-radius: 3px; background: var(--line); position: relative }
.seen { background: var(--c0) } .unseen { background: color-mix(in srgb, var(--c0) 45%, Canvas) }
.bar .blind { margin: -2px -1px } i.blind { height: 16px; width: 2px; background: CanvasText }
i.chance { height: 22px; width: 0; border-left: 3px dotted var(--c1) } .bar .chance { margin: -5px -1px }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden } .card b { float: right }
.card div { padding: 8px 12px 12px } figure img { border-radius: 6px } .axis { stroke: var(--line) }
.card .answer { font-size: 15px; font-weight: 600; color: CanvasText; max-height: 15em; overflow: auto }
.good { color: color-mix(in srgb, #0c9a55 75%, CanvasText) } text { fill: var(--soft); font-size: 11px }
.bad { color: color-mix(in srgb, #e03c2c 80%, CanvasText) } polyline { fill: none; stroke-width: 2 }
.row { font-weight: 600; margin: 18px 0 -6px }
figcaption svg { display: inline; width: 24px; height: 8px; margin: 0 6px 0 16px; stroke-width: 2 }
"""


def write_report(
    path: Path, title: str, facts: list[tuple[str, str]], results: list[dict], examples: list[dict],
    curves: dict[str, dict[str, list[tuple[float, float]]]], overlays: list[dict],
    scales: list[tuple[str, list[dict]]],
) -> None:  # fmt: skip
    """Everything on one page. What is empty leaves its section out."""
    terms = [f"<dl><dt>{quote(str(k))}</dt><dd>{quote(str(v))}</dd></dl>" for k, v in facts]
    body = f"<h1>{quote(title)}</h1>" + html_grid("", terms, 165) + html_results(results)
    body += html_scales(scales)
    body += html_grid("What the decoder sees: the bright patches", [html_overlay(o) for o in overlays], 215)
    body += html_grid("Examples", [html_card(e) for e in examples], 215)
    body += html_grid("Training, log scale over steps", [html_chart(*c) for c in curves.items()], 420)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{quote(title)}</title>'
    page = f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head><body>{body}</body></html>'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")  # an answer may hold half a surrogate pair
    os.replace(temporary, path)


def html_grid(heading: str, cells: list[str], width: int) -> str:
    """A section of equal columns, at least `width` pixels wide each; nothing where there are no cells."""
    columns = f"grid-template-columns: repeat(auto-fill, minmax(min({width}px, 100%), 1fr))"
    grid = f'<h2>{heading}</h2><div class="grid" style="{columns}">{"".join(cells)}</div>'
    return grid.removeprefix("<h2></h2>") if any(cells) else ""


def html_image(image: Image.Image, alt: str, most: int = 320) -> str:
    """A picture that carries its own bytes; photos are shrunk, or fifty of them would make a heavy page."""
    image = image.convert("RGB")  # also a copy, as thumbnail works in place
    image.thumbnail((most, most))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{quote(alt)}" src="data:image/png;base64,{code}">'


def html_results(results: list[dict]) -> str:
    """A row with a bar for every result; full and pruned of one task and number of shots stand together."""
    groups = {}
    for r in sorted(results, key=lambda r: r["tokens"]):  # full before pruned, else in the order given
        groups.setdefault((r["task"], r["shots"]), []).append(r)
    rows = "".join(html_row(group, i) for group in groups.values() for i in range(len(group)))
    key = '<i class="unseen"></i>score up to blind<i class="seen"></i>what looking adds'
    key += '<i class="chance"></i>chance<i class="blind"></i>blind: same questions, other pictures'
    head = '<th class="left">task<th class="left">tokens<th><th>score<th>blind<th>chance<th>questions'
    table = f'<div style="overflow-x: auto"><table><tr>{head}</tr>{rows}</table></div>'
    return f'<h2>Results</h2><p class="key">{key}</p>{table}' if rows else ""


def html_row(group: list[dict], i: int) -> str:
    """Row i of a group; the first one also names the group."""
    r = group[i]
    base, _, part = quote(r["task"]).partition("/")
    top = 100 * max(1, math.ceil(max(g["score"] for g in group) / 100))  # CIDEr-D may exceed 100
    notes = [quote(r["metric"])] + ["lower is better"] * (r["metric"] == LOSS)
    notes += [f"{r['shots']}-shot"] * (r["shots"] > 0) + [f"bar to {top}"] * (top > 100)
    name = part or f"<b>{base}</b><br><small>{', '.join(notes)}</small>"
    row = "" if i else f'<td class="left" rowspan="{len(group)}">{name}</td>'
    row += f'<td class="left"><small>{quote(r["tokens"])}</small></td><td><div class="bar">'
    score, blind, chance = values = r["score"], r.get("blind_score"), r.get("chance")
    marks = (("seen", score), ("unseen", min(score, blind or 0)), ("chance", chance), ("blind", blind))
    loss = r["metric"] == LOSS  # no share of 100, and lower is better: no bar
    for mark, value in () if loss else marks:
        side = "width" if "seen" in mark else "left"
        if value is not None:
            row += f'<i class="{mark}" style="{side}: {max(0, min(100, 100 * value / top)):.1f}%"></i>'
    digits = 3 if loss else 1
    score, blind, chance = ("–" if value is None else f"{value:.{digits}f}" for value in values)
    error = "" if r["stderr"] is None else f"± {r['stderr']:.{digits}f}"
    row += f"</div></td><td><b>{score}</b> <small>{error}</small></td>"
    row += f"<td>{blind}</td><td>{chance}</td><td>{r['n']:,}</td>"
    return f'<tr class="{"part" if part else "" if i else "first"}">{row}</tr>'


def html_card(e: dict) -> str:
    """One picture, question and answer. A sign and a word tell the verdict; colour only repeats it."""
    kind, verdict = ("good", "✓ right") if e["score"] > 0.999 else ("bad", "✗ wrong")
    if 0 < e["score"] <= 0.999:
        kind, verdict = "", f"◐ {100 * e['score']:.0f} %"
    if e["metric"] == "cider_d_x100":  # a caption is not right or wrong
        kind, verdict = "", f"CIDEr-D {100 * e['score']:.0f}"
    right = list(dict.fromkeys(e["right"]))[:3] or ["–"]
    known = "reference: " + right[0] if len(right[0]) > 40 else "right: " + " / ".join(right)
    text = f'<b class="{kind}">{verdict}</b><small>{quote(e["task"])}</small><p>{quote(e["question"])}</p>'
    text += f'<p class="answer">{quote(e["answer"]) or "–"}</p><p>{quote(known)}</p>'
    if e.get("blind_answer") is not None:
        text += f"<p>with another picture: {quote(e['blind_answer']) or '–'}</p>"
    picture = html_image(e["image"], e["question"]) if e["image"] else ""
    return f'<div class="card">{picture}<div>{text}</div></div>'


def html_overlay(o: dict) -> str:
    """The picture under its patch grid, perhaps its windows, each patch as bright as its weight."""
    S = len(o["weight"])
    patch = max(8, 288 // S)  # whole pixels a patch
    light = np.kron(0.2 + 0.8 * o["weight"], np.ones((patch, patch)))[..., None]  # (S*patch, S*patch, 1)
    pixels = light * np.asarray(o["image"].convert("RGB").resize((S * patch, S * patch)))
    for side, share, colour in ((1, 0.15, 128), (o.get("window", S), 0.7, (59, 127, 224))):
        for edge in (np.s_[side * patch :: side * patch], np.s_[:, side * patch :: side * patch]):
            pixels[edge] = (1 - share) * pixels[edge] + share * np.array(colour)
    picture = html_image(Image.fromarray(pixels.astype(np.uint8)), o["label"], S * patch)
    return f"<figure>{picture}<figcaption>{quote(o['label'])}</figcaption></figure>"


def html_scales(rows: list[tuple[str, list[dict]]]) -> str:
    """A row of overlays, coarse to fine, for each model: before and after scaling."""
    note = """Attention of each scale's last block, mean over heads and over the tokens of a window.
        Brightness: 60 % even over the window's patches, 100 % four times that or more, 20 % a quarter
        or less. Blue lines part windows. Spread: 1 / sum of squares, mean over tokens."""
    cells = [(quote(label), html_grid("", [html_overlay(o) for o in row], 280)) for label, row in rows]
    grids = "".join(f'<p class="row">{label}</p>{grid}' for label, grid in cells)
    return f"<h2>Where each scale looks</h2><p>{note}</p>{grids}" if rows else ""


def html_chart(name: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """One stage's curves over steps, on a logarithmic axis that CE, KL and the steep start can share."""
    lines = {label: [p for p in points if 0 < p[1] < math.inf] for label, points in lines.items()}
    every = np.array([point for points in lines.values() for point in points])
    if not len(every):
        return ""
    (x0, low), (x1, high) = every.min(0), every.max(0)
    x1, low = max(x1, x0 + 1), max(low, high / 1000)  # what is smaller lies on the floor
    round_numbers = [m * 10.0**e for e in range(-40, 40) for m in (1, 2, 5)]
    y0, y1 = max(t for t in round_numbers if t <= low), min(t for t in round_numbers if t > high)
    ticks = [t for t in round_numbers if y0 <= t <= y1]
    stride = next(t for t in round_numbers if t >= max(1, (x1 - x0) / 5))

    def place(x: float, y: float) -> tuple[float, float]:
        return 44 + 414 * (x - x0) / (x1 - x0), 214 - 206 * max(0, math.log(y / y0)) / math.log(y1 / y0)

    svg, legend = "", f"<b>{quote(name)}</b>"
    for t in ticks if len(ticks) < 9 else ticks[::3]:
        y = place(x0, t)[1]
        svg += f'<path class="axis" d="M44 {y}H458"/><text x="38" y="{y + 4}" text-anchor="end">{t:g}</text>'
    for t in np.arange(math.ceil(x0 / stride), x1 / stride + 1e-9) * stride:
        svg += f'<text x="{place(t, y0)[0]}" y="232" text-anchor="middle">{t:,.0f}</text>'
    for i, (label, points) in enumerate((label, points) for label, points in lines.items() if points):
        parts = np.array_split(points, min(len(points), 100))  # a long noisy curve is drawn as 100 means
        spots = [place(*part.mean(0)) for part in parts]
        style = f'style="stroke: var(--c{i % 4}); stroke-dasharray: {DASHES[i % 4]}"'
        svg += f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>'
        for x, y in spots if len(spots) < 20 else []:  # what is measured rarely shows when
            svg += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: var(--c{i % 4})"/>'
        legend += f'<svg viewBox="0 0 24 8"><path d="M0 4H24" {style}/></svg>{quote(label)}'
        legend += f" {points[-1][1]:.3g}"
    return f'<figure><figcaption>{legend}</figcaption><svg viewBox="0 0 480 238">{svg}</svg></figure>'


# ---------------------------------------------------------------------------------------------------------
# Pictures of what the model does


@torch.no_grad()
def draw_overlays(vlm, images: list[Image.Image]) -> list[dict]:
    """For each pruner that chooses, how much of every patch survives: its share of the kept tokens that cover
    it, in the whole picture. Not for those that merge, nor for those that read the question.
    """
    overlays, cfg = [], vlm.cfg
    for image in images:
        device = next(vlm.parameters()).device
        batch = data.prompt_batch([data.load_sample([0], [image], cfg)], "pruned", cfg).to(device)
        states = vlm.states(batch.pixels)
        levels = vlm.levels(states)
        tokens, V = vlm.connector(levels), cfg.visual_tokens()  # (tiles, V, D), of which the first is shown
        for name, pruner in prune.PRUNERS.items():
            if pruner.merges or "text" in pruner.needs or not cfg.fits(name):
                continue
            keep = prune.kept_tokens(name, cfg.prune.keep, V, cfg.grid(), cfg.scale_tokens())
            features = levels[-1] if pruner.where == "patches" else tokens
            kept = prune.select(name, features, keep, **vlm.pruner_needs(name, states, batch))[0].tolist()
            survives = np.zeros((cfg.side, cfg.side))
            for token in kept:
                rows, columns, share = token_window(cfg, token)
                survives[rows, columns] += share
            label = f"{name} keeps {keep} of {V}"
            overlays.append({"image": image, "label": label, "weight": survives / max(survives.max(), 1e-9)})
    return overlays


@torch.no_grad()
def draw_scales(vlm, step: Path, image: Image.Image) -> list[tuple[str, list[dict]]]:
    """Where the tokens of each scale look, in the run that this one came from (if still there) and in it."""
    if not isinstance(vlm.connector, model.ChainOfSight):
        return []
    runs, rows = [(step, vlm)], []
    try:
        before = model.find_step(model.read_json(step / "config.json")["train"]["init"])
        runs.insert(0, (before, model.VLM.from_pretrained(before).eval()))  # on the CPU: one picture
    except UserError:
        pass  # it came from no run, or that one is gone
    for folder, run in runs:
        pixels = torch.from_numpy(data.load_images([image], run.cfg)).to(run.pixel_mean.device)
        levels, S, row = run.levels(run.states(pixels)), run.cfg.side, []
        for scale, (window, queries) in zip(run.connector.scales, run.cfg.scales()):
            attention = patch_attention(scale, levels)[0].cpu()  # (tokens, P)
            times_even = (
                attention.sum(0).view(S, S).numpy() * window**2 / queries
            )  # mean over a window's tokens
            weight = (0.5 + np.log2(times_even + 1e-9) / 4).clip(0, 1)
            spread = f"{attention.square().sum(1).reciprocal().mean():.1f} of {window**2}"
            label = f"{len(attention)} tokens, windows of {window}×{window} patches; "
            label += f"a token spreads over {spread}"
            row.append({"image": image, "label": label, "weight": weight, "window": window})
        stage = {"pretrain": "stage 1", "sft": "stage 2"}[model.read_json(folder / "config.json")["stage"]]
        rows.append((f"{stage}, {run.cfg.visual_tokens()} tokens", row))
    return rows


@torch.no_grad()
def patch_attention(scale: model.Scale, levels: list[torch.Tensor]) -> torch.Tensor:
    """Which patches each token looks at in the block of the highest level: (I, windows * q, P), fp32.

    Mean over heads; rows sum to 1 and are 0 outside the token's own window. Computed anew from queries and
    keys, as fused attention never holds these weights.
    """
    x, cut = scale.queries[None], [model.cut_windows(level, scale.window) for level in levels]
    for block, context in zip(scale.blocks[:-1], cut):
        x = block(x, context, scale.key_positions)
    block, context = scale.blocks[-1], scale.blocks[-1].norm_context(cut[-1])
    if scale.key_positions is not None:
        context = context + scale.key_positions
    q = block.to_q(block.norm_queries(x)).expand(len(context), -1, -1, -1)
    k, _ = block.to_kv(context).chunk(2, -1)
    q, k = (model.split_heads(x.flatten(0, 1), block.heads) for x in (q, k))  # (I*windows, H, q or W*W, D/H)
    scores = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    inside = scores.softmax(-1).mean(1).unflatten(0, cut[-1].shape[:2])  # (I, windows, q, W*W)
    P = levels[-1].shape[1]
    patches = torch.arange(P, device=q.device).view(1, P, 1)
    where = model.cut_windows(patches, scale.window).mT.expand_as(
        inside
    )  # a patch's number in the whole grid
    return inside.new_zeros(*inside.shape[:3], P).scatter_(3, where, inside).flatten(1, 2)


def token_window(cfg: model.ModelConfig, token: int) -> tuple[slice, slice, float]:
    """The patches that visual token number `token` looks at (rows, columns), and 1 / how many they are."""
    windows = [(cfg.side // cfg.grid(), 1)] if cfg.grid() else cfg.scales()  # a resampler's tokens see all
    for window, queries in windows:
        per_side = cfg.side // window
        if token < per_side**2 * queries:
            row, column = divmod(token // queries, per_side)
            rows = slice(row * window, (row + 1) * window)
            columns = slice(column * window, (column + 1) * window)
            return rows, columns, 1 / window**2
        token -= per_side**2 * queries
    raise ValueError(f"token {token} lies beyond the last scale")


if __name__ == "__main__":
    model.run_cli(main)
