"""A LightningModule around torch_bptt.RNN, with truncated backpropagation through time.

The task: symbols arrive, and each has to be said again `delay` steps later. With a delay of 4:

    step     0  1  2  3  4  5  6  ...
    input    3  1  1  2  0  3  2  ...    one of four symbols
    answer   0  0  0  0  3  1  1  ...    the input of 4 steps ago; before there was one, 0

Lightning 2.0 took its `truncated_bptt_steps` away. Two things take its place, neither of which
cuts the batch into pieces by hand:

    --updates one    RNN(..., truncate=k): one call and one update for a whole sequence, as in any
                     LightningModule; gradients end at steps k, 2k, ...  `Echo.training_step`
    --updates many   torch_bptt.tbptt: an update every k steps, from a gradient over the last 2k,
                     by manual optimization.  `EchoWithManyUpdates.training_step`

    pip install lightning tqdm
    python examples/lightning_model.py                  # seconds on one core
    python examples/lightning_model.py --updates many
    python examples/lightning_model.py --help

Symbols: T steps, B batch, H hidden size.
"""

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from command_line import Parser, count, make_folder, natural, positive, require, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from torch_bptt import RNN, tbptt

require(["lightning", "tqdm"])
import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

SYMBOLS = 4
CLIP = 1.0  # largest norm of the gradient of an update


class Echoes:
    """Batches of x (B, T, SYMBOLS) and the answers (B, T), new ones in every pass unless fixed."""

    def __init__(self, batches: int, batch: int, T: int, delay: int, seed: int, fixed: bool):
        self.batches, self.shape, self.delay, self.fixed = batches, (batch, T), delay, fixed
        self.seed, self.random = seed, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.fixed:
            self.random.manual_seed(self.seed)
        for _ in range(self.batches):
            symbols = torch.randint(SYMBOLS, self.shape, generator=self.random)
            yield one_hot(symbols, SYMBOLS).float(), pad(symbols, (self.delay, -self.delay))


def loss_of(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, T, SYMBOLS), in bits."""
    return cross_entropy(logits.flatten(0, 1), answers.flatten()) / math.log(2)


class Echo(lightning.LightningModule):
    """A recurrent layer and a linear read-out, trained with one update for each batch."""

    def __init__(self, hidden: int, k: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that a checkpoint can make the module again
        self.rnn = self.make_rnn()
        self.readout = nn.Linear(hidden, SYMBOLS)

    def make_rnn(self) -> RNN:
        return RNN(SYMBOLS, self.hparams.hidden, batch_first=True, truncate=self.hparams.k)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, SYMBOLS), hx (1, B, H) -> logits (B, T, SYMBOLS), the state after step T."""
        output, hx = self.rnn(x, hx)
        return self.readout(output), hx

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, answers = batch
        logits, _ = self(x)
        loss = loss_of(logits, answers)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, answers = batch
        logits, _ = self(x)
        self.log("right", (logits.argmax(-1) == answers).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.lr)

    @property
    def clipping(self) -> dict[str, float]:
        """What the Trainer clips; with manual optimization it must not."""
        return {"gradient_clip_val": CLIP}


class EchoWithManyUpdates(Echo):
    """The same network, trained with an update every k steps."""

    clipping: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, hidden: int, k: int, lr: float) -> None:
        super().__init__(hidden, k, lr)
        self.automatic_optimization = False

    def make_rnn(self) -> RNN:
        return RNN(SYMBOLS, self.hparams.hidden, batch_first=True)  # tbptt cuts the gradient

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, answers = batch
        k, optimizer = self.hparams.k, self.optimizers()
        loss, _ = tbptt(
            self, x, answers, loss_of, k1=k, k2=2 * k, optimizer=optimizer,
            before_update=lambda: nn.utils.clip_grad_norm_(self.parameters(), CLIP),
        )  # fmt: skip
        self.log("loss", loss, prog_bar=True)


class Lines(Callback):
    """Progress where there is no terminal for a bar: a line after each pass."""

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: Echo) -> None:
        if not trainer.sanity_checking:
            seen = {name: value.item() for name, value in trainer.callback_metrics.items()}
            figures = "   ".join(f"{name} {value:.3f}" for name, value in seen.items())
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}   {figures}", flush=True)


def make_trainer(args: argparse.Namespace, clipping: dict[str, float]) -> lightning.Trainer:
    terminal = sys.stderr.isatty()
    best = ModelCheckpoint(filename="best", monitor="right", mode="max", save_last=True)
    return lightning.Trainer(
        accelerator="cpu", max_epochs=args.epochs, **clipping,
        logger=CSVLogger(args.out, name=None), log_every_n_steps=10,
        callbacks=[best, TQDMProgressBar() if terminal else Lines()],
        enable_progress_bar=terminal, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


# --- the command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Learn to echo symbols with a LightningModule and truncated backpropagation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--updates", choices=["one", "many"], default="one", help="for each sequence: see above")
    add("--delay", type=count, metavar="D", default=8, help="steps after which a symbol is due")
    add("--k", type=count, metavar="K", default=20, help="steps that a gradient goes back, or half")
    add("--T", type=count, default=100, help="steps of a sequence")
    add("--batch", type=count, metavar="B", default=32, help="sequences in a batch")
    add("--batches", type=count, metavar="N", default=50, help="in an epoch")
    add("--epochs", type=count, metavar="N", default=8, help="passes, each over new sequences")
    add("--hidden", type=count, metavar="H", default=64, help="units")
    add("--lr", type=positive, metavar="RATE", default=3e-3, help="learning rate of Adam")
    add("--seed", type=natural, metavar="N", default=0, help="of the weights and the sequences")
    add("--out", type=Path, metavar="DIR", default="out/lightning_model", help="of the results")
    args = parser.parse_args()
    if args.delay >= args.T:
        parser.error(f"--delay must be below --T {args.T}, got {args.delay}")
    return args


def main() -> int:
    args = parse_arguments()
    make_folder(args.out)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # Lightning's own, of how it looks at nested batches.
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is", FutureWarning)
    lightning.seed_everything(args.seed, verbose=False)
    cls = Echo if args.updates == "one" else EchoWithManyUpdates
    model = cls(args.hidden, args.k, args.lr)
    sizes = args.batch, args.T, args.delay
    training = Echoes(args.batches, *sizes, args.seed, fixed=False)
    validation = Echoes(10, *sizes, args.seed + 1, fixed=True)
    trainer = make_trainer(args, model.clipping)
    trainer.fit(model, training, validation)
    best = trainer.checkpoint_callback
    print(f"right answers on new sequences: {best.best_model_score:.1%}; guessing has 25%")
    print(f"updates: {trainer.global_step}; numbers and checkpoints: {trainer.log_dir}")
    return 0


if __name__ == "__main__":
    run(main)
