"""A character language model trained with truncated BPTT: nn.RNN and torch_bptt.RNN side by side.

The model reads a text one character at a time and predicts the next one:

    e_t = embedding[c_t]
    h_t = tanh(e_t W_ih^T + h_{t-1} W_hh^T + b)
    logits_t = h_t W_out^T + b_out

Backpropagating through the whole text is out of reach, so the text is cut into chunks of T
characters. The state goes from one chunk to the next (the model remembers); the gradient does not
(`state.detach()`). This is truncated backpropagation through time (Williams and Peng, 1990); it is
in `Trainee.train_step`, which is where to start reading.

Both models start from the same weights and take turns on the same chunks, so whatever else the
machine does slows both. At first their losses agree to rounding. Then the rounding errors grow, as
in any long computation with feedback, and what agrees is the quality.

Symbols: T steps per chunk, B batch, H hidden size, L layers, V characters known.

    python examples/char_lm.py          # about two minutes on two cores
    python examples/char_lm.py --text book.txt --steps 5000 --only torch_bptt
    python examples/char_lm.py --help
"""

import argparse
import copy
import hashlib
import math
import os
import signal
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import Parser, count, fail, make_folder, natural, positive, require, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torch_bptt

RNN = {"torch": nn.RNN, "torch_bptt": torch_bptt.RNN}  # the only difference between the models
TITLE = {"torch": "torch.nn.RNN", "torch_bptt": "torch_bptt.RNN"}

EMBEDDING = 64
CLIP = 1.0  # largest norm of the gradient, which sometimes explodes (Pascanu et al., 2013)
STDLIB_CHARACTERS = 6_000_000  # more than the default steps read: nothing is read twice
HELD_OUT = 0.1  # this last part of the text is never trained on
HELD_OUT_CHUNKS = 50  # at most so many are used: a second or two per model
RARE, RARE_BELOW = "\ufffd", 10  # characters seen less often than this share one entry
CHECK_STEPS = 10  # until then rounding errors have not grown much


# --- the text -------------------------------------------------------------------------------------


def stdlib_text() -> str:
    """Source files of Python's standard library, STDLIB_CHARACTERS long, the same on every run."""
    root = Path(sysconfig.get_path("stdlib"))
    # Tests repeat themselves, encodings and pydoc_data are tables, packages installed are not ours.
    skip = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    skip |= {"site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if skip.isdisjoint(path.relative_to(root).parts)]
    # In the order of a hash of the name: mixed, so that the held-out end resembles the rest.
    files.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    text = ""
    for path in files:
        try:
            text += path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= STDLIB_CHARACTERS:
            break
    if not text:
        fail(f"found no Python source files in {root}: give a text with --text FILE")
    return text[:STDLIB_CHARACTERS]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or one line that says what is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        fail(f"--text {path}: cannot be read: {error.strerror}")
    if not data:
        fail(f"--text {path}: the file is empty")
    if 0 in data:
        fail(f"--text {path}: must be text, got a binary file (zero byte at {data.index(0)})")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} at {error.start}"
        fail(f"--text {path}: must be UTF-8 text, got {bad}")


class Corpus:
    """A text as numbers, cut into B streams that are read in parallel.

    train, held_out: (length, B) int64. Column b is one consecutive piece of the text, so the state
    after one chunk is the right start for the next. symbols: the V characters; number 0 is RARE.
    """

    def __init__(self, text: str, batch: int, chunk: int) -> None:
        needed = math.ceil(batch * (chunk + 1) / HELD_OUT)  # one chunk must fit the held-out part
        if len(text) < needed:
            sizes = f"--batch {batch} and --chunk {chunk}"
            fail(f"the text is too short: {sizes} need {needed} characters, got {len(text)}")
        self.chunk = chunk
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        split = len(text) - math.ceil(len(text) * HELD_OUT)
        codes, counts = self._codes(text[:split]).unique(return_counts=True)
        self.symbols = RARE + "".join(map(chr, codes[counts >= RARE_BELOW])).replace(RARE, "")
        self._number = torch.zeros(sys.maxunicode + 1, dtype=torch.int64)
        self._number[self._codes(self.symbols)] = torch.arange(len(self.symbols))
        self.train = self._streams(text[:split], batch)
        self.held_out = self._streams(text[split:], batch)

    @staticmethod
    def _codes(text: str) -> Tensor:
        return torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32).long()

    def encode(self, text: str) -> Tensor:
        """Numbers of the characters, (len(text),) int64."""
        return self._number[self._codes(text)]

    def _streams(self, text: str, batch: int) -> Tensor:
        length = len(text) // batch
        return self.encode(text[: length * batch]).view(batch, length).t().contiguous()

    def training_chunk(self, step: int) -> tuple[Tensor, bool]:
        """Characters of this step (T + 1, B), and whether the text starts again with it."""
        index = step % ((len(self.train) - 1) // self.chunk)
        return self._cut(self.train, index), index == 0

    def held_out_chunks(self) -> list[Tensor]:
        count = min(HELD_OUT_CHUNKS, (len(self.held_out) - 1) // self.chunk)
        return [self._cut(self.held_out, index) for index in range(count)]

    def _cut(self, streams: Tensor, index: int) -> Tensor:
        # T + 1 characters: 0 ... T-1 are read, 1 ... T are predicted.
        return streams[index * self.chunk : (index + 1) * self.chunk + 1]


# --- the model and its training -------------------------------------------------------------------


class CharModel(nn.Module):
    """Embedding, recurrent layer, read-out."""

    def __init__(self, rnn: type[nn.Module], symbols: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, EMBEDDING)
        self.rnn = rnn(EMBEDDING, hidden, num_layers=layers)
        self.readout = nn.Linear(hidden, symbols)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (T, B), state (L, B, H) or None for zeros -> logits (T, B, V), the next state."""
        output, state = self.rnn(self.embedding(tokens), state)
        return self.readout(output), state


@dataclass
class Trainee:
    """A model in training, with all that is needed to go on training it."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    state: Tensor | None = None  # (L, B, H), carried from chunk to chunk
    losses: list[float] = field(default_factory=list)  # of each step, nats per character
    seconds: list[float] = field(default_factory=list)  # of each step

    @classmethod
    def build(cls, rnn: type[nn.Module], symbols: int, args: argparse.Namespace) -> "Trainee":
        torch.manual_seed(args.seed)  # the same seed: the same initial weights in either layer
        model = CharModel(rnn, symbols, args.hidden, args.layers)
        return cls(model, torch.optim.Adam(model.parameters()))

    def train_step(self, tokens: Tensor, restart: bool, learning_rate: float) -> None:
        """Learn one chunk, tokens (T + 1, B): T steps forward, the same T back, one update."""
        begin = time.perf_counter()
        if restart:
            self.state = None
        logits, state = self.model(tokens[:-1], self.state)
        loss = cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        # The truncation: the next chunk starts from these numbers, and no gradient goes back
        # through them into this one.
        self.state = state.detach()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)

    def state_dict(self) -> dict:
        modules = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return modules | {"state": self.state, "losses": self.losses, "seconds": self.seconds}

    def load_state_dict(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.losses, self.seconds = saved["state"], saved["losses"], saved["seconds"]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """From --lr down to nearly zero, along half a cosine."""
    return args.lr * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(trainees: dict[str, Trainee], corpus: Corpus, args: argparse.Namespace) -> int:
    """Train all models in turn, step by step. Returns the steps done: fewer after a Ctrl-C."""
    step = len(next(iter(trainees.values())).losses)
    interrupted = False

    def interrupt(*_) -> None:
        # Obeyed between two steps, so that no checkpoint holds half a step. A second Ctrl-C is not
        # waited for.
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, interrupt)
    progress = Progress(trainees, args, step)
    while step < min(args.steps, args.stop_at or args.steps) and not interrupted:
        tokens, restart = corpus.training_chunk(step)
        for name, trainee in trainees.items():
            trainee.train_step(tokens, restart, learning_rate(step, args))
            if not math.isfinite(trainee.losses[-1]):
                fail(f"{TITLE[name]}: the loss of step {step} is {trainee.losses[-1]}", 1)
        step += 1
        progress.show(step)
        if step == min(CHECK_STEPS, args.steps) and not args.only:
            progress.write(check_agreement(trainees, corpus, args))
        if step % args.checkpoint_every == 0:
            save_checkpoint(trainees, corpus, args)
    progress.close()
    save_checkpoint(trainees, corpus, args)
    signal.signal(signal.SIGINT, previous)
    return step


class Progress:
    """One bar per model on a terminal; elsewhere, as in a log, a line for each tenth of the way."""

    def __init__(self, trainees: dict[str, Trainee], args: argparse.Namespace, step: int) -> None:
        from tqdm import tqdm

        self.tqdm, self.trainees, self.args = tqdm, trainees, args
        layout = (
            "{desc:<14} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
        )
        options = {"total": args.steps, "initial": step, "bar_format": layout, "disable": None}
        self.bars = {name: tqdm(desc=TITLE[name], **options) for name in trainees}

    def show(self, step: int) -> None:
        figures = {}
        for name, trainee in self.trainees.items():
            bits = statistics.fmean(trainee.losses[-20:]) / math.log(2)
            speed = self.args.batch * self.args.chunk / statistics.median(trainee.seconds[-20:])
            figures[name] = f"{bits:.3f} bits/char, {speed:,.0f} char/s"
            self.bars[name].set_postfix_str(figures[name], refresh=False)
            self.bars[name].update()
        tenths = 10 * step // self.args.steps
        if self.bars[name].disable and tenths > 10 * (step - 1) // self.args.steps:
            line = "   ".join(f"{TITLE[name]} {text}" for name, text in figures.items())
            print(f"step {step}/{self.args.steps}   {line}", flush=True)

    def write(self, line: str) -> None:
        self.tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


# --- do the two layers agree? ---------------------------------------------------------------------


def check_agreement(trainees: dict[str, Trainee], corpus: Corpus, args: argparse.Namespace) -> str:
    """Compare the losses of the first steps; fail if rounding does not explain the difference.

    The yardstick is the same training with nn.RNN in float64: let E be the largest distance of
    nn.RNN's float32 losses from it. Another float32 implementation sums in another order, so its
    errors are of the same size but not equal: it may be 2 E away, plus the rounding of one loss,
    r = eps (1 + ceil(log2 K)) loss, because E may be small by luck; K = T B H, the terms of the
    nested sums. By the triangle inequality the two may then differ by 3 E + r. (A wrong gradient
    shows after one update, in the second or third digit.)
    """
    count = min(CHECK_STEPS, args.steps)
    exact = Trainee.build(nn.RNN, len(corpus.symbols), args)
    exact.model.double()
    for step in range(count):
        exact.train_step(*corpus.training_chunk(step), learning_rate(step, args))
    ours, theirs = (trainees[name].losses[:count] for name in ("torch_bptt", "torch"))
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    distance = max(abs(a - b) for a, b in zip(theirs, exact.losses, strict=True))
    depth = 1 + math.ceil(math.log2(args.chunk * args.batch * args.hidden))
    bound = 3 * distance + torch.finfo(torch.float32).eps * depth * max(exact.losses)
    figures = f"{difference:.1e} nats, bound {bound:.1e}"
    if difference > bound:
        fail(f"the layers disagree: losses of the first {count} steps differ by {figures}", 1)
    return f"the layers agree: losses of the first {count} steps differ by at most {figures}"


# --- checkpoints ----------------------------------------------------------------------------------


def identity(corpus: Corpus, args: argparse.Namespace) -> dict:
    """All that decides a run's numbers: a checkpoint is continued only where this is the same."""
    options = ("only", "hidden", "layers", "steps", "batch", "chunk", "lr", "seed")
    return {f"--{name}": getattr(args, name) for name in options} | {"text": corpus.digest}


def save_checkpoint(trainees: dict[str, Trainee], corpus: Corpus, args: argparse.Namespace) -> None:
    checkpoint = {
        "identity": identity(corpus, args),
        "trainees": {name: trainee.state_dict() for name, trainee in trainees.items()},
        "rng": torch.get_rng_state(),  # nothing here draws numbers in training; dropout would
    }
    # Written beside the old file, then renamed: there is never half a checkpoint.
    partial = args.checkpoint.with_name(args.checkpoint.name + ".partial")
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, args.checkpoint)
    except (OSError, RuntimeError) as error:
        fail(f"--checkpoint {args.checkpoint}: cannot be written: {str(error).splitlines()[0]}")


def resume(trainees: dict[str, Trainee], corpus: Corpus, args: argparse.Namespace) -> None:
    """Fill the trainees from --resume, so that they go on with exactly the numbers they had."""
    try:
        checkpoint = torch.load(args.resume, weights_only=True)
        made_with = checkpoint["identity"]
    except OSError as error:
        fail(f"--resume {args.resume}: cannot be read: {error.strerror}")
    except Exception:  # torch.load has no error of its own for "this file is not mine"
        fail(f"--resume {args.resume}: is not a checkpoint of this example")
    for name, value in identity(corpus, args).items():
        if made_with.get(name) != value:
            values = f"made with {name} {made_with.get(name)}, this run has {value}"
            fail(f"--resume {args.resume}: does not fit: {values}")
    for name, trainee in trainees.items():
        trainee.load_state_dict(checkpoint["trainees"][name])
    torch.set_rng_state(checkpoint["rng"])


# --- what was learned -----------------------------------------------------------------------------


@torch.no_grad()
def validate(model: CharModel, corpus: Corpus) -> tuple[float, float]:
    """Bits per character of the held-out text, and the standard error of that over B streams."""
    state, losses = None, []
    for tokens in corpus.held_out_chunks():
        logits, state = model(tokens[:-1], state)
        loss = cross_entropy(logits.movedim(-1, 1), tokens[1:], reduction="none")  # (T, B)
        losses.append(loss.mean(0) / math.log(2))
    streams = torch.stack(losses).mean(0)
    return streams.mean().item(), streams.std(correction=0).item() / math.sqrt(len(streams))


@torch.no_grad()
def sample(model: CharModel, corpus: Corpus, prompt: str, args: argparse.Namespace) -> str:
    """Let the model go on after the prompt: every character drawn is the next one it reads."""
    generator = torch.Generator().manual_seed(args.seed)
    text = prompt
    logits, state = model(corpus.encode(prompt).unsqueeze(1))
    for _ in range(args.sample):
        weights = (logits[-1, 0] / args.temperature).softmax(0)
        weights[0] = 0  # RARE is no character
        token = torch.multinomial(weights, 1, generator=generator)
        text += corpus.symbols[token]
        logits, state = model(token.view(1, 1), state)
    return text


def gradient_reach(model: CharModel, corpus: Corpus) -> Tensor:
    """How far back the gradient reaches: |dL_t / dh_{t-k}| / |dL_t / dh_t| in row k, (2 T, B).

    L_t is the loss of one prediction. The layer is called once per character: so every state is a
    tensor of the graph, and autograd can be asked for the gradient there. The norms soon leave
    the range of float32, hence float64.
    """
    model = copy.deepcopy(model).double()
    *tokens, target = corpus.held_out[: 2 * corpus.chunk + 1]
    state, states = None, []
    for token in tokens:
        _, state = model.rnn(model.embedding(token).unsqueeze(0), state)
        states.append(state)
    # The sum over the batch: rows do not mix, so row b of a gradient belongs to row b's loss.
    loss = cross_entropy(model.readout(state[-1]), target, reduction="sum")
    gradients = torch.autograd.grad(loss, states[::-1])
    norms = torch.stack([grad.movedim(1, 0).flatten(1).norm(dim=1) for grad in gradients])
    return norms / norms[0]


def report(trainees: dict[str, Trainee], corpus: Corpus, args: argparse.Namespace) -> None:
    """Print quality, speed and a sample, and draw the curves."""
    print(f"\n{'':16}{'held-out bits/char':>20}{'training step':>18}{'char/s':>12}")
    bits, error, step = {}, {}, {}
    for name, trainee in trainees.items():
        bits[name], error[name] = validate(trainee.model, corpus)
        step[name] = statistics.median(trainee.seconds)
        quality, speed = (
            f"{bits[name]:.3f} ± {error[name]:.3f}",
            args.batch * args.chunk / step[name],
        )
        print(f"{TITLE[name]:16}{quality:>20}{step[name] * 1e3:>15.1f} ms{speed:>12,.0f}")
    if not args.only:
        apart = abs(bits["torch_bptt"] - bits["torch"])
        verdict = "within" if apart <= error["torch"] else "MORE THAN"
        print(f"quality: {apart:.4f} bits/char apart, {verdict} the standard error")
        ratio = step["torch"] / step["torch_bptt"]
        print(f"speed-up: {ratio:.2f} times (median step: forward, backward, clipping, Adam)")
    name, best = list(trainees.items())[-1]
    if args.sample:
        print(f"\n--- written by the model with {TITLE[name]}, temperature {args.temperature:g}")
        print(sample(best.model, corpus, "\n" if args.text else "def ", args).strip("\n") + "\n---")
    if not args.no_plot:
        untrained = Trainee.build(RNN[name], len(corpus.symbols), args).model
        reach = {
            "at initialisation": gradient_reach(untrained, corpus),
            "after training": gradient_reach(best.model, corpus),
        }
        print(f"\ncurves: {draw_curves(trainees, reach, args)}")
    print(f"checkpoint: {args.checkpoint}")


def draw_curves(
    trainees: dict[str, Trainee], reach: dict[str, Tensor], args: argparse.Namespace
) -> Path:
    """Four panels: loss by step, loss by time, how far the two are apart, reach of the gradient."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    )
    pyplot.rcParams.update({"grid.color": "#e8e8e8", "legend.frameon": False, "font.size": 10.5})
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
    (by_step, by_time), (apart, back) = axes
    sizes = f"H = {args.hidden}, L = {args.layers}, T = {args.chunk}, B = {args.batch}"
    figure.suptitle(f"Character language model, truncated BPTT, {sizes}", fontweight="bold")

    colours, widths = {"torch": "#a9b4c2", "torch_bptt": "#c8102e"}, {"torch": 5, "torch_bptt": 1.5}
    window = max(1, args.steps // 50)
    for name, trainee in trainees.items():
        bits = (torch.tensor(trainee.losses) / math.log(2)).unfold(0, window, 1).mean(1)
        seconds = torch.tensor(trainee.seconds).cumsum(0)[window - 1 :]
        style = {"color": colours[name], "label": TITLE[name]}
        by_step.plot(range(window, window + len(bits)), bits, linewidth=widths[name], **style)
        by_time.plot(seconds, bits, linewidth=2, **style)
        by_time.plot(seconds[-1], bits[-1], "o", color=colours[name])
    by_step.set(
        title="Loss by step", xlabel=f"step (mean of {window})", ylabel="bits per character"
    )
    by_time.set(
        title="Loss by time in training steps", xlabel="seconds", ylabel="bits per character"
    )
    by_step.legend()
    by_time.legend()

    if args.only:
        apart.set_axis_off()
    else:
        ours, theirs = (torch.tensor(t.losses, dtype=torch.float64) for t in trainees.values())
        difference = (ours - theirs).abs() / math.log(2)
        apart.semilogy(range(1, args.steps + 1), difference, ".", markersize=4, color="#4a5a6a")
        apart.set(
            title="Difference of the two losses: rounding, and its growth",
            ylabel="bits per character",
        )
        apart.set(xlabel="step (equal losses are not drawn)")

    # The wide line lies below: before much is learned the two are nearly the same.
    styles = ({"color": "#e08a00", "linewidth": 4}, {"color": "#1f6fb4", "linewidth": 1.8})
    for (label, norms), style in zip(reach.items(), styles, strict=True):
        low, middle, high = norms.quantile(torch.tensor([0.2, 0.5, 0.8]).to(norms), dim=1)
        back.fill_between(range(len(middle)), low, high, color=style["color"], alpha=0.2, lw=0)
        back.semilogy(middle, label=f"{label} (median, 20 to 80 %)", **style)
    back.axvline(args.chunk, color="#777777", linestyle=":", label="training cut the gradient here")
    back.set(title="How far back the gradient reaches", xlabel="distance k, characters")
    back.set(ylabel=r"$|dL_t/dh_{t-k}|\;/\;|dL_t/dh_t|$", ylim=(1e-20, 10))
    back.legend(frameon=True, edgecolor="white", framealpha=1)
    path = args.out / "curves.png"
    figure.savefig(path, dpi=130)
    return path


# --- the command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train a character language model with truncated BPTT, once with torch.nn.RNN "
        "and once with torch_bptt.RNN, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text; None: the standard library's source")
    add("--hidden", type=count, metavar="H", default=256, help="units per layer")
    add("--layers", type=count, metavar="L", default=1, help="recurrent layers")
    add("--steps", type=count, metavar="N", default=2200, help="training steps, one chunk each")
    add("--batch", type=count, metavar="B", default=16, help="pieces of text read in parallel")
    add("--chunk", type=count, metavar="T", default=100, help="characters a gradient goes back")
    add("--lr", type=positive, metavar="RATE", default=3e-3, help="learning rate at the start")
    add(
        "--seed", type=natural, metavar="N", default=0, help="of the initial weights and the sample"
    )
    add("--threads", type=count, metavar="N", help="CPU threads; None: PyTorch's own choice")
    add("--only", choices=RNN, help="train only one of the two; None: both")
    add("--out", type=Path, metavar="DIR", default="out/char_lm", help="folder of the results")
    add("--checkpoint", type=Path, metavar="FILE", help="file to write; None: DIR/checkpoint.pt")
    add("--checkpoint-every", type=count, metavar="N", default=100, help="steps between two")
    add("--resume", type=Path, metavar="FILE", help="checkpoint to go on from, with equal options")
    add("--stop-at", type=count, metavar="N", help="stop at this step with a checkpoint")
    add("--sample", type=natural, metavar="N", default=400, help="characters to generate; 0: none")
    add("--temperature", type=positive, default=0.7, help="of the sample; low is careful")
    add("--no-plot", action="store_true", help="draw no curves")
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or args.out / "checkpoint.pt"
    return args


def main() -> int:
    args = parse_arguments()
    require(["tqdm"] if args.no_plot else ["tqdm", "matplotlib"])
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus(read_text(args.text) if args.text else stdlib_text(), args.batch, args.chunk)
    names = [args.only] if args.only else list(RNN)
    trainees = {name: Trainee.build(RNN[name], len(corpus.symbols), args) for name in names}
    weights = [trainee.model.state_dict() for trainee in trainees.values()]
    if any(not torch.equal(weights[0][key], weights[-1][key]) for key in weights[0]):
        fail("the two layers do not draw the same initial weights from the same seed", 1)
    if args.resume:
        resume(trainees, corpus, args)
    make_folder(args.out)
    make_folder(args.checkpoint.parent)

    source = f"{args.text or 'standard library'}: {corpus.train.numel():,} characters to learn"
    print(f"{source}, {corpus.held_out.numel():,} held out, {len(corpus.symbols)} symbols")
    print(f"{', '.join(TITLE[name] for name in names)}; {torch.get_num_threads()} threads")
    done = train(trainees, corpus, args)
    if done < args.steps:
        print(f"stopped at step {done} of {args.steps}; to go on: --resume {args.checkpoint}")
        return 0 if done == args.stop_at else 130
    report(trainees, corpus, args)
    return 0


if __name__ == "__main__":
    run(main)
