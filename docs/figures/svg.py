"""Drawing for the figures of the documentation: SVG, small, and the same bytes on every machine.

Coordinates are pixels from the upper left corner, rounded to tenths.
"""

import math
import re
from html import escape
from pathlib import Path

BLACK, GREY, BLUE, RED, GREEN = "#1f2328", "#8c959f", "#0969da", "#cf222e", "#1a7f37"
PALE = "#f0f3f6"


def _number(value):
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0")  # + 0.0: no -0


def _attributes(**values):
    parts = []
    for name, value in values.items():
        if value is not None:
            value = _number(value) if isinstance(value, int | float) else value
            parts.append(f' {name.replace("_", "-")}="{value}"')
    return "".join(parts)


class Drawing:
    """Shapes in the order they are added; ``svg()`` is the file."""

    def __init__(self, width, height, title):
        self.size, self.title, self.parts = (width, height), title, []

    def line(self, points, color=BLACK, width=1.5, dash=None, arrow=False):
        """A line through points [(x, y), ...], with a head at its end if ``arrow``."""
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        style = _attributes(stroke=color, stroke_width=width, stroke_dasharray=dash)
        self.parts.append(f'<polyline points="{path}" fill="none"{style}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            angle = math.atan2(y - y0, x - x0)
            corners = [
                (x - 8 * math.cos(angle + turn), y - 8 * math.sin(angle + turn))
                for turn in (-0.4, 0.4)
            ]
            head = " ".join(f"{_number(a)},{_number(b)}" for a, b in [(x, y), *corners])
            self.parts.append(f'<polygon points="{head}" fill="{color}"/>')

    def box(self, x, y, width, height, fill=PALE, stroke=GREY, radius=4):
        shape = _attributes(x=x, y=y, width=width, height=height, rx=radius)
        self.parts.append(f'<rect{shape} fill="{fill}" stroke="{stroke}"/>')

    def text(self, x, y, words, size=14, color=BLACK, anchor="middle", italic=False):
        """words with subscripts, ``h_t`` or ``h_{t-1}``, and superscripts, ``W^k``."""
        style = _attributes(
            x=x, y=y, font_size=size, fill=color, text_anchor=anchor,
            font_style="italic" if italic else None,
        )  # fmt: skip
        spans, shift = [], 0
        for mark, braced, single, plain in re.findall(r"([_^])(?:\{([^}]*)\}|(.))|([^_^]+)", words):
            level = {"_": 4, "^": -6, "": 0}[mark]
            small = _attributes(font_size=size - 4) if mark else ""
            span = escape(braced or single or plain)
            spans.append(f"<tspan{_attributes(dy=level - shift)}{small}>{span}</tspan>")
            shift = level
        self.parts.append(f"<text{style}>{''.join(spans)}</text>")

    def svg(self):
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" font-family="sans-serif">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="{width}" height="{height}" fill="white"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


class Plot(Drawing):
    """Curves over a linear x axis and a logarithmic y axis of whole powers of ten."""

    LEFT, TOP, RIGHT, BOTTOM = 70, 20, 150, 50

    def __init__(self, title, x_label, y_label, x_ticks, powers):
        super().__init__(640, 360, title)
        self.x_range, self.y_range = (x_ticks[0], x_ticks[-1]), (powers[0], powers[-1])
        bottom, right = 360 - self.BOTTOM, 640 - self.RIGHT
        for tick in x_ticks:
            x, _ = self.place(tick, 1)
            self.line([(x, self.TOP), (x, bottom)], PALE, 1)
            self.text(x, bottom + 18, str(tick), 12)
        for power in powers:
            _, y = self.place(x_ticks[0], 10.0**power)
            self.line([(self.LEFT, y), (right, y)], PALE, 1)
            self.text(self.LEFT - 8, y + 4, f"10^{{{power}}}", 12, anchor="end")
        self.line([(self.LEFT, self.TOP), (self.LEFT, bottom), (right, bottom)], GREY, 1)
        self.text((self.LEFT + right) / 2, 350, x_label, 13)
        self.text(self.LEFT, 13, y_label, 13, anchor="start")

    def place(self, x, y):
        (x0, x1), (low, high) = self.x_range, self.y_range
        across = (x - x0) / (x1 - x0) * (640 - self.RIGHT - self.LEFT)
        up = (math.log10(y) - low) / (high - low) * (360 - self.BOTTOM - self.TOP)
        return self.LEFT + across, 360 - self.BOTTOM - up

    def curve(self, values, label, color, dash=None):
        """values: [(x, y), ...]; the label stands at the right end."""
        points = [self.place(x, y) for x, y in values]
        self.line(points, color, 2, dash)
        self.text(points[-1][0] + 8, points[-1][1] + 4, label, 12, color, "start")


def write(figures):
    """figures: file name -> function that returns a Drawing; written beside this file."""
    for name, draw in figures.items():
        (Path(__file__).parent / name).write_text(draw().svg())
