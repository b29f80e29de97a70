"""A recurrent policy for TorchRL: torch_bptt.RNN with episodes that end inside a rollout.

TorchRL marks the first step of each episode in `is_init`. While data are collected the policy is
called step by step and its state travels in the tensordict; for the loss it is called on whole
rollouts, (rows, T), in which episodes begin anywhere. `RNNModule` does both, and the second in one
call, reset=is_init: rollouts are neither split into episodes nor padded.

The task: a cue points left or right, noise follows for a time that differs from episode to episode,
and when the signal comes the action has to be the one that the cue pointed to.

    step         0      1      2     ...   last
    cue         1, 0   0, 0   0, 0   ...   0, 0     then another episode begins
    noise       0.31   -0.7   1.2    ...   0.05
    signal       0      0      0     ...    1       reward: 1 for the right action, else 0

Learning is REINFORCE: the gradient of log pi(action) (reward - 1/2) at the signal goes back through
the recurrent loop to the cue.

    pip install torchrl tqdm
    python examples/torchrl_policy.py          # seconds on one core
    python examples/torchrl_policy.py --help

Symbols: T steps of a rollout, B environments in parallel, H hidden size.
"""

import argparse

import torch
from command_line import Parser, count, natural, positive, require, run
from torch import Tensor, nn

from torch_bptt import RNN

require(["torchrl", "tqdm"])
from tensordict import TensorDict, TensorDictBase  # noqa: E402
from tensordict.nn import (  # noqa: E402
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torchrl.collectors import Collector  # noqa: E402
from torchrl.data import Categorical, Composite, Unbounded  # noqa: E402
from torchrl.envs import EnvBase, InitTracker, TensorDictPrimer, TransformedEnv  # noqa: E402
from torchrl.modules import ProbabilisticActor, recurrent_mode, set_recurrent_mode  # noqa: E402

FEATURES = 4  # of an observation


class RNNModule(TensorDictModuleBase):
    """torch_bptt.RNN in a tensordict, as torchrl.modules.GRUModule is torch.nn.GRU.

    One layer: then its output is its state, so the state after every step is known, not only the
    last one.

    Reads "observation" (..., I), "is_init" (..., 1) and "recurrent_state" (..., 1, H); writes
    "hidden" (..., H) and ("next", "recurrent_state"). The leading dimensions are those of the
    tensordict: any when called step by step, (rows, T) under set_recurrent_mode(True).
    """

    def __init__(self, input_size: int, hidden_size: int, **options) -> None:
        super().__init__()
        self.rnn = RNN(input_size, hidden_size, batch_first=True, **options)
        self.in_keys = ["observation", "recurrent_state", "is_init"]
        self.out_keys = ["hidden", ("next", "recurrent_state")]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """What an environment needs so that its tensordicts hold the state, at first zeros."""
        spec = Unbounded((1, self.rnn.hidden_size))
        return TensorDictPrimer({"recurrent_state": spec}, expand_specs=True)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        x = tensordict["observation"]
        begins = tensordict["is_init"].squeeze(-1)
        states = tensordict["recurrent_state"]
        if recurrent_mode():
            # (rows, T): reset drops the state where an episode begins, at step 0 the given one.
            hx = states[:, 0].transpose(0, 1)
            hidden, _ = self.rnn(x, hx, reset=begins)
        else:
            shape = x.shape[:-1]
            hx = states.reshape(1, -1, self.rnn.hidden_size)
            hidden, _ = self.rnn(x.reshape(-1, 1, x.shape[-1]), hx, reset=begins.reshape(-1, 1))
            hidden = hidden.reshape(*shape, -1)
        tensordict["hidden"] = hidden
        tensordict["next", "recurrent_state"] = hidden.unsqueeze(-2)
        return tensordict


class Recall(EnvBase):
    """The task, in B rows that begin and end on their own."""

    def __init__(self, rows: int, shortest: int, longest: int, seed: int) -> None:
        super().__init__(batch_size=[rows])
        self.lengths = shortest, longest
        self.random = torch.Generator().manual_seed(seed)
        observation = Unbounded((rows, FEATURES))
        self.observation_spec = Composite(observation=observation, shape=(rows,))
        self.action_spec = Categorical(2, (rows,))
        self.reward_spec = Unbounded((rows, 1))
        self.cue, self.left = torch.zeros(2, rows, dtype=torch.int64)  # steps left, this one too

    def _observe(self, begins: Tensor) -> TensorDict:
        observation = torch.zeros(*self.batch_size, FEATURES)
        observation[:, :2] = nn.functional.one_hot(self.cue, 2) * begins[:, None]
        observation[:, 2] = torch.randn(self.batch_size, generator=self.random)
        observation[:, 3] = self.left == 1
        return TensorDict({"observation": observation}, self.batch_size)

    def _reset(self, tensordict: TensorDictBase | None, **options) -> TensorDict:
        begins = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None:  # then only some rows may begin
            begins = tensordict.get("_reset", begins[:, None]).squeeze(-1)
        shortest, longest = self.lengths
        drawn = [(0, 2), (shortest, longest + 1)]
        cue, left = (torch.randint(*d, self.batch_size, generator=self.random) for d in drawn)
        self.cue, self.left = cue.where(begins, self.cue), left.where(begins, self.left)
        return self._observe(begins)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        ends = self.left == 1
        reward = (ends & (tensordict["action"] == self.cue)).float()
        self.left = self.left - 1
        result = self._observe(torch.zeros(self.batch_size, dtype=torch.bool))
        return result.update({"reward": reward[:, None], "done": ends[:, None]})

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.random.manual_seed(seed)


def make_policy(hidden: int) -> ProbabilisticActor:
    logits = TensorDictModule(nn.Linear(hidden, 2), in_keys=["hidden"], out_keys=["logits"])
    network = TensorDictSequential(RNNModule(FEATURES, hidden), logits)
    return ProbabilisticActor(
        network, in_keys=["logits"], distribution_class=torch.distributions.Categorical,
        default_interaction_type="random",
    )  # fmt: skip


def loss_of(policy: ProbabilisticActor, rollout: TensorDictBase) -> Tensor:
    """REINFORCE over a rollout (B, T), whose actions matter at the last step of an episode only."""
    ends = rollout["next", "done"].squeeze(-1)
    better = rollout["next", "reward"].squeeze(-1) - 0.5  # than guessing
    with set_recurrent_mode(True):
        pi = policy.get_dist(rollout)
    return -(pi.log_prob(rollout["action"]) * better)[ends].sum() / ends.sum().clamp(min=1)


def right_answers(rollout: TensorDictBase) -> float:
    ends = rollout["next", "done"]
    return rollout["next", "reward"][ends].mean().item()


def train(policy: ProbabilisticActor, args: argparse.Namespace) -> float:
    """The fraction of right answers in the last tenth of the rollouts."""
    from tqdm import tqdm

    env = TransformedEnv(Recall(args.envs, args.shortest, args.longest, args.seed), InitTracker())
    env = env.append_transform(policy[0][0].make_tensordict_primer())
    frames = args.envs * args.T
    collector = Collector(env, policy, frames_per_batch=frames, total_frames=frames * args.updates)
    optimizer = torch.optim.Adam(policy.parameters(), args.lr)
    bar = tqdm(total=args.updates, desc="updates", disable=None)
    recent: list[float] = []
    for update, rollout in enumerate(collector, 1):
        loss = loss_of(policy, rollout)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-args.updates // 10 + 1 :], right_answers(rollout)]
        if 10 * update // args.updates > 10 * (update - 1) // args.updates:
            mean = sum(recent) / len(recent)
            bar.set_postfix_str(f"right answers {mean:.1%}", refresh=False)
            if bar.disable:
                print(f"update {update}/{args.updates}   right answers {mean:.1%}", flush=True)
        bar.update()
    bar.close()
    collector.shutdown()
    return sum(recent) / len(recent)


# --- the command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Train a recurrent policy with TorchRL: remember a cue until the signal comes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shortest", type=count, metavar="N", default=5, help="steps of the shortest episode")
    add("--longest", type=count, metavar="N", default=12, help="steps of the longest episode")
    add("--envs", type=count, metavar="B", default=64, help="environments in parallel")
    add("--T", type=count, default=32, help="steps of a rollout")
    add("--updates", type=count, metavar="N", default=100, help="of the policy, a rollout each")
    add("--hidden", type=count, metavar="H", default=64, help="units")
    add("--lr", type=positive, metavar="RATE", default=3e-3, help="learning rate of Adam")
    add("--seed", type=natural, metavar="N", default=0, help="of weights, environments, actions")
    args = parser.parse_args()
    if args.shortest > args.longest:
        parser.error(f"--shortest must be at most --longest {args.longest}, got {args.shortest}")
    return args


def main() -> int:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    right = train(make_policy(args.hidden), args)
    print(f"right answers in the last rollouts: {right:.1%}; guessing has 50%")
    return 0


if __name__ == "__main__":
    run(main)
