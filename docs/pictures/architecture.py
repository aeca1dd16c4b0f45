"""Draw docs/pictures/architecture.svg, the picture in the README: python docs/pictures/architecture.py"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 470
BLUE, GREEN, ORANGE, GRAY = "#dbeafe", "#dcfce7", "#ffedd5", "#f3f4f6"

# x, y, width, height, colour, title, lines below it
BOXES = [
    (20, 60, 150, 84, GREEN, "sources", ["images, captions", "mdit/sources"]),
    (20, 166, 150, 84, GREEN, "frozen towers", ["autoencoder, text", "mdit/encoders"]),
    (200, 60, 150, 190, GREEN, "precompute", ["decode, crop,", "encode, write", "", "mdit/precompute"]),
    (380, 60, 150, 190, GREEN, "shards", ["latents, embeddings", "", "order(seed, step)", "readers", "mdit/data"]),
    (20, 330, 330, 110, GRAY, "recipe.toml + deepspeed.json", ["what is learned, how it is run", "mdit/config.py"]),
    (380, 330, 150, 110, ORANGE, "engine", ["ZeRO, AdamW,", "experts and tensors", "mdit/train, parallel"]),
    (560, 330, 200, 110, ORANGE, "EMA, checkpoint", ["resumes bit for bit,", "in any layout", "mdit/checkpoint"]),
    (790, 330, 190, 110, BLUE, "snapshot", ["mdit.load_snapshot,", "generate, evaluate", "mdit/eval"]),
    (570, 92, 98, 140, "#ffffff", "patch mixer", ["all patches,", "dense and", "expert blocks"]),
    (688, 92, 82, 140, "#ffffff", "mask", ["drops 75 %", "of patches"]),
    (790, 92, 98, 140, "#ffffff", "backbone", ["sparse blocks,", "expert choice"]),
    (908, 92, 64, 140, "#ffffff", "loss", ["on kept", "patches"]),
]  # fmt: skip
ARROWS = [
    [(170, 102), (200, 102)], [(170, 208), (200, 208)], [(350, 155), (380, 155)], [(530, 155), (570, 155)],
    [(668, 162), (688, 162)], [(770, 162), (790, 162)], [(888, 162), (908, 162)], [(350, 385), (380, 385)],
    [(530, 385), (560, 385)], [(760, 385), (790, 385)],
    [(940, 232), (940, 290), (455, 290), (455, 330)],  # gradients
    [(420, 330), (420, 270), (620, 270), (620, 250)],  # weights
]  # fmt: skip


def draw() -> str:
    shapes = [
        text(20, 34, "mdit: from pictures to a trained MicroDiT", 20, "bold"),
        box(560, 60, 420, 190, BLUE),
        text(570, 80, "MicroDiT: mdit/models, mdit/diffusion; fused operations: kernels", 12),
        *[arrow(points) for points in ARROWS],
        text(640, 284, "gradients", 12),
        text(470, 264, "weights", 12),
    ]
    for x, y, width, height, colour, title, lines in BOXES:
        size = 12 if width < 100 else 15
        shapes += [box(x, y, width, height, colour), text(x + 8, y + 22, title, size, "bold")]
        shapes += [text(x + 8, y + 44 + 17 * i, line, 11 if width < 100 else 13) for i, line in enumerate(lines)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Arial, sans-serif">'
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">{}</marker>'
    tip = tip.format('<path d="M 0 0 L 7 3 L 0 6 z"/>')
    page = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    return "\n".join([head, f"<defs>{tip}</defs>", page, *shapes, "</svg>", ""])


def box(x: int, y: int, width: int, height: int, colour: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{colour}" stroke="#374151"/>'


def text(x: int, y: int, words: str, size: int, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="#111827">{escape(words)}</text>'


def arrow(points: list[tuple[int, int]]) -> str:
    line = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="#374151" stroke-width="1.5" marker-end="url(#tip)"/>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
