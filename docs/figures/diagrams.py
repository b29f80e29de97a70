"""Diagrams of the tutorial and of the page about CUDA: `make figures`."""

import svg
from svg import BLACK, BLUE, GREEN, GREY, PALE, RED, Drawing


def unrolled():
    """Three steps of the network: states go right, gradients come back."""
    drawing = Drawing(720, 330, "The network unrolled over three steps")
    centers = [200, 380, 560]
    drawing.text(60, 172, "h_{-1}", 16, BLUE, italic=True)
    for t, x in enumerate(centers):
        before = 84 if t == 0 else centers[t - 1] + 40
        drawing.box(x - 40, 140, 80, 50)
        drawing.text(x, 171, f"h_{t}", 16, italic=True)
        drawing.line([(before, 155), (x - 42, 155)], BLUE, arrow=True)
        drawing.line([(x - 40, 178), (before + 2, 178)], RED, dash="5 3", arrow=True)
        drawing.text((before + x - 40) / 2, 147, "W_{hh}", 12, BLUE, italic=True)
        carried = f"δ_{t} W_{{hh}}"
        drawing.text((before + x - 40) / 2, 198, carried, 12, RED, italic=True)
        drawing.text(x, 285, f"x_{t}", 16, italic=True)
        drawing.line([(x - 10, 265), (x - 10, 192)], BLUE, arrow=True)
        drawing.line([(x + 10, 190), (x + 10, 263)], RED, dash="5 3", arrow=True)
        drawing.text(x - 16, 235, "W_{ih}", 12, BLUE, "end", italic=True)
        drawing.text(x + 16, 235, f"δ_{t} W_{{ih}}", 12, RED, "start", italic=True)
        drawing.text(x, 60, f"o_{t} → ℓ_{t}", 16, italic=True)
        drawing.line([(x - 10, 138), (x - 10, 70)], BLUE, arrow=True)
        drawing.line([(x + 10, 70), (x + 10, 137)], RED, dash="5 3", arrow=True)
        drawing.text(x - 16, 108, "V", 12, BLUE, "end", italic=True)
        drawing.text(x + 16, 108, f"g_{t} = e_{t} V", 12, RED, "start", italic=True)
    drawing.line([(602, 155), (660, 155)], BLUE, arrow=True)
    drawing.line([(660, 178), (602, 178)], RED, dash="5 3", arrow=True)
    drawing.text(668, 160, "h_n", 14, BLUE, "start", italic=True)
    drawing.text(668, 183, "dL/dh_n", 14, RED, "start", italic=True)
    drawing.line([(60, 24), (100, 24)], BLUE, arrow=True)
    drawing.text(108, 29, "forward: one use of the same weights at every step", 13, BLUE, "start")
    drawing.line([(500, 24), (460, 24)], RED, dash="5 3", arrow=True)
    drawing.text(508, 29, "backward: gradients", 13, RED, "start")
    return drawing


def windows():
    """Truncated BPTT, k1 = 2 and k2 = 4: which losses reach back to which steps."""
    drawing = Drawing(720, 250, "Windows of truncated BPTT for k1 = 2 and k2 = 4")
    left, width, steps, k1, k2 = 150, 66, 8, 2, 4
    for t in range(steps):
        drawing.box(left + t * width, 20, width - 8, 30)
        drawing.text(left + t * width + (width - 8) / 2, 40, f"h_{t}", 14, italic=True)
    drawing.text(left - 12, 40, "steps", 13, anchor="end")
    for row, end in enumerate(range(k1, steps + 1, k1)):
        y = 72 + 42 * row
        first = max(0, end - k2)
        drawing.text(left - 12, y + 19, f"update {row + 1}", 13, anchor="end")
        for t in range(first, end):
            counted = t >= end - k1
            drawing.box(
                left + t * width, y, width - 8, 26, "#ffebe9" if counted else PALE,
                RED if counted else GREY,
            )  # fmt: skip
            if counted:
                middle = left + t * width + (width - 8) / 2
                drawing.text(middle, y + 18, f"ℓ_{t}", 13, RED, italic=True)
        edge = left + end * width - 8
        drawing.line([(edge, y + 32), (left + first * width, y + 32)], RED, 1.2, "5 3", True)
    return drawing


def memory():
    """Where the numbers of a call live, from registers to memory."""
    drawing = Drawing(720, 330, "Where state lives in the kernel")
    rows = [
        (BLUE, "registers", "sums of a tile: 6 rows x 64 columns of z_t", "one tile at a time"),
        (BLUE, "first-level cache", "finished block: z_t becomes h_t in place", "60 x 64 numbers"),
        (GREEN, "second-level cache", "W_{hh}, W_{ih} in panels", "packed once a call"),
        (GREEN, "", "one chunk of x_t, h_t; backward: δ_t of two chunks, packed p_t, x_t",
         "256 rows or more"),
        (RED, "memory", "x, output h, their gradients: T steps", "the caller's; nothing else"),
    ]  # fmt: skip
    for i, (color, where, what, size) in enumerate(rows):
        y = 20 + 60 * i
        if where:
            drawing.text(150, y + 29, where, 14, color, "end")
        drawing.box(165, y, 375 + 10, 46, PALE, color)
        drawing.text(357, y + 28, what, 11.5)
        drawing.text(560, y + 28, size, 12, GREY, "start")
        if i:
            drawing.line([(350, y - 13), (350, y - 2)], GREY, 1.2, arrow=False)
    return drawing


def cuda_paths():
    """Where the weight and the state are during a step, in each of the paths on a GPU."""
    drawing = Drawing(956, 392, "Weights and states on a GPU: block, cluster, grid and step")

    def part(x, y, width, height, words, color=GREY, fill="white", size=11.5):
        """Words, one below the other, in a box."""
        drawing.box(x, y, width, height, fill, color, 3)
        for i, line in enumerate(words):
            drawing.text(x + width / 2, y + height / 2 + 4 + 15 * (i - (len(words) - 1) / 2), line,
                         size, BLACK if color == GREY else color)  # fmt: skip

    def block(x, y, width, weight, state):
        """A thread block: what its registers and its shared memory hold."""
        drawing.box(x, y, width, 100)
        part(x + 6, y + 6, width - 12, 40, weight, BLUE)
        part(x + 6, y + 54, width - 12, 40, state, GREEN)

    for x, title, when in (
        (16, "block", "small H"),
        (252, "cluster", "medium H"),
        (488, "grid", "large H"),
        (724, "step, gemm", "any size"),
    ):
        drawing.text(x + 108, 24, title, 16)
        drawing.text(x + 108, 42, when, 12, GREY)
        part(x, 300, 216, 52, ["memory: the drive c_t is read,", "the states h_t are written"])

    block(36, 92, 176, ["all of W_{hh}"], ["all of h_t, of a few rows"])
    drawing.line([(124, 192), (124, 206), (22, 206), (22, 80), (124, 80), (124, 90)], RED,
                 arrow=True)  # fmt: skip
    drawing.text(124, 224, "every step: one barrier of the block", 11, RED)
    drawing.line([(94, 232), (94, 298)], GREY, 1.2, arrow=True)
    drawing.line([(154, 298), (154, 236)], GREY, 1.2, arrow=True)

    for i in range(2):
        block(256 + 108 * i, 92, 100, [f"W_{{hh}}, part {i + 1}"], ["all of h_t"])
    for i, j in ((0, 1), (1, 0)):
        x, to, y = 306 + 108 * i, 306 + 108 * j, 206 + 14 * i
        drawing.line([(x - 12, 192), (x - 12, y), (to + 12, y), (to + 12, 194)], RED, arrow=True)
    drawing.text(360, 238, "every step: each block sends its units", 11, RED)
    drawing.text(360, 252, "into the shared memory of all others", 11, RED)
    drawing.line([(330, 258), (330, 298)], GREY, 1.2, arrow=True)
    drawing.line([(390, 298), (390, 260)], GREY, 1.2, arrow=True)

    for i in range(2):
        block(492 + 108 * i, 92, 100, [f"W_{{hh}}, part {i + 1}"], ["slice of h_t;", "sums of all"])
        x = 542 + 108 * i
        drawing.line([(x - 10, 194), (x - 10, 232)], RED, arrow=True)
        drawing.line([(x + 10, 232), (x + 10, 194)], RED, arrow=True)
    drawing.line([(542, 90), (542, 82), (650, 82), (650, 90)], RED, arrow=True)
    drawing.line([(650, 82), (542, 82), (542, 90)], RED, arrow=True)
    drawing.text(596, 60, "every step: sums within a cluster,", 11, RED)
    drawing.text(596, 74, "then states to all blocks", 11, RED)
    part(488, 234, 216, 40, ["second-level cache: h_t"])
    drawing.line([(556, 274), (556, 298)], GREY, 1.2, arrow=True)
    drawing.line([(636, 298), (636, 276)], GREY, 1.2, arrow=True)

    for i in range(2):
        block(728 + 108 * i, 92, 100, ["sums of", "one tile"], ["pieces of", "W_{hh} and h_{t-1}"])
        x = 778 + 108 * i
        drawing.line([(x, 232), (x, 194)], RED, arrow=True)
    part(724, 234, 216, 40, ["second-level cache: W_{hh}, h_{t-1}"])
    drawing.text(832, 74, "every step: kernels of its own", 11, RED)
    drawing.line([(792, 274), (792, 298)], GREY, 1.2, arrow=True)
    drawing.line([(872, 298), (872, 276)], GREY, 1.2, arrow=True)

    drawing.box(16, 366, 14, 14, "white", BLUE, 3)
    drawing.text(36, 378, "registers of a block", 12, BLUE, "start")
    drawing.box(262, 366, 14, 14, "white", GREEN, 3)
    drawing.text(282, 378, "shared memory of a block", 12, GREEN, "start")
    drawing.line([(512, 373), (536, 373)], RED, arrow=True)
    drawing.text(544, 378, "what the next step waits for", 12, RED, "start")
    return drawing


FIGURES = {
    "unrolled.svg": unrolled,
    "windows.svg": windows,
    "memory.svg": memory,
    "cuda-paths.svg": cuda_paths,
}

if __name__ == "__main__":
    svg.write(FIGURES)
