"""Draws our loss over 200 published training steps beside the published one, as a PNG.

    JAX_PLATFORMS=cpu PYTHONPATH=. python tests/parity_curve.py docs/parity_curve.png

Scenic's own trainer made the stored numbers; ours starts from the same parameters and
sees the same clips and masks (`scenic_pretrain`). Above the losses, theirs as a wide
line and ours as a thin one on it; below by how much they differ.
"""

import argparse
from pathlib import Path

import numpy as np
import scenic_pretrain
from PIL import Image, ImageDraw, ImageFont

WIDTH, TALL, LOW = 900, 420, 200  # pixels: the picture, the losses, the differences
LEFT, RIGHT, TOP, GAP = 90, 130, 40, 60
SMOOTH = 3  # drawn so many times larger, then made smaller
INK, GRID, THEIRS = (40, 40, 40), (225, 225, 225), (190, 190, 190)
COLOURS = {
    "spectrogram": (181, 54, 122),
    "total": (20, 90, 160),
    "rgb": (200, 120, 20),
}


class Plot:
    """A rectangle of the picture with axes: steps to the right, values upwards."""

    def __init__(self, draw: ImageDraw.ImageDraw, top: int, height: int, ticks):
        self.draw, self.top, self.height, self.ticks = draw, top, height, ticks
        self.font = ImageFont.load_default(size=13 * SMOOTH)

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Pixels of a point; the ticks span the axis."""
        low, high = self.ticks[0], self.ticks[-1]
        x = LEFT + step / 200 * (WIDTH - LEFT - RIGHT)
        y = self.top + self.height * (high - value) / (high - low)
        return x * SMOOTH, y * SMOOTH

    def axes(self, title: str, text):
        """Grid lines, their values by the function `text`, and a title."""
        for value in self.ticks:
            ends = [self.place(0, value), self.place(200, value)]
            self.draw.line(ends, GRID, SMOOTH)
            x, y = ends[0]
            at = (x - 8 * SMOOTH, y)
            self.draw.text(at, text(value), INK, self.font, anchor="rm")
        for step in range(0, 201, 50):
            x, y = self.place(step, self.ticks[0])
            at = (x, y + 6 * SMOOTH)
            self.draw.text(at, str(step), INK, self.font, anchor="mt")
        x, y = self.place(0, self.ticks[-1])
        self.draw.text((x, y - 10 * SMOOTH), title, INK, self.font, anchor="ls")

    def line(self, values, colour, width: float):
        points = [self.place(i, v) for i, v in enumerate(values)]
        self.draw.line(points, colour, round(width * SMOOTH), joint="curve")

    def name(self, text: str, step: float, value: float, colour):
        x, y = self.place(step, value)
        at = (x + 8 * SMOOTH, y)
        self.draw.text(at, text, colour, self.font, anchor="lm")


def picture(ours: dict, published: dict) -> Image.Image:
    """Both curves {name: [200]} and their relative difference."""
    size = (WIDTH, TOP + TALL + GAP + LOW + 40)
    canvas = Image.new("RGB", [x * SMOOTH for x in size], (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    top = max(float(x.max()) for x in published.values())
    losses = Plot(draw, TOP, TALL, np.arange(0, np.ceil(2 * top) / 2 + 0.1, 0.5))
    losses.axes("loss, at each update (wide: published, thin: ours)", "{:.1f}".format)
    errors = {k: np.abs(ours[k] / published[k] - 1) for k in published}
    floor = {k: np.log10(np.maximum(x, 1e-8)) for k, x in errors.items()}
    differences = Plot(draw, TOP + TALL + GAP, LOW, np.arange(-8, -1))
    title = "relative difference (the bound is 1e-02)"
    differences.axes(title, lambda value: f"1e{value:03d}")
    for name, colour in COLOURS.items():
        losses.line(published[name], THEIRS, 6)
        losses.line(ours[name], colour, 1.5)
        losses.name(name, 200, float(published[name][-20:].mean()), colour)
        differences.line(floor[name], colour, 1)
    return canvas.resize(size, Image.Resampling.LANCZOS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="the PNG to write")
    path = parser.parse_args().path
    published, (ours, _) = (
        scenic_pretrain.published_curve(),
        scenic_pretrain.our_curve(),
    )
    picture(ours, published).save(path, optimize=True)
    worst = max(np.abs(ours[k] / published[k] - 1).max() for k in published)
    print(f"{path}: the curves differ by at most {worst:.1e} of the loss")


if __name__ == "__main__":
    main()
