"""examples/torchrl_policy.py: as a user runs it, and whole rollouts against single steps."""

import re
import runpy

import pytest
import scripts
import torch
from pairs import assert_same, randn

pytest.importorskip("torchrl", reason="needs TorchRL: make test-frameworks")
pytest.importorskip("tqdm")

# TorchRL's own: what it keeps for older programs warns when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SCRIPT = scripts.EXAMPLES / "torchrl_policy.py"
B, T, H = 3, 9, 5


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


def test_it_learns():
    done = scripts.run(SCRIPT, "--updates", 60, "--shortest", 3, "--longest", 6)
    assert done.stderr == ""
    assert len(re.findall(r"^update \d+/60   right answers [\d.]+%$", done.stdout, re.M)) == 10
    assert float(re.search(r"last rollouts: ([\d.]+)%", done.stdout)[1]) > 95, done.stdout


@pytest.fixture
def rollout(example):
    """Observations, where episodes begin, and a state from before that some of them drop."""
    from tensordict import TensorDict

    begins = torch.zeros(B, T, 1, dtype=torch.bool)
    begins[[0, 0, 1, 2, 2], [0, 4, 8, 3, 4]] = True
    return TensorDict(
        {
            "observation": randn(B, T, example["FEATURES"]),
            "is_init": begins,
            "recurrent_state": randn(B, T, 1, H, seed=1),
        },
        [B, T],
    )


def gradients(hidden, module):
    return torch.autograd.grad((hidden * randn(*hidden.shape, seed=2)).sum(), module.parameters())


@pytest.mark.parametrize("options", [{}, {"alpha": 0.3, "nonlinearity": "relu"}], ids=str)
def test_a_whole_rollout_is_its_single_steps_and_a_loop(example, rollout, options):
    from torchrl.modules import set_recurrent_mode

    torch.manual_seed(0)
    module = example["RNNModule"](example["FEATURES"], H, **options).double()
    with set_recurrent_mode(True):
        whole = module(rollout.clone())
    assert_same("state", whole["next", "recurrent_state"].squeeze(-2), whole["hidden"])

    steps, state = [], rollout["recurrent_state"][:, 0]
    for t in range(T):
        step = rollout[:, t].clone()
        step["recurrent_state"] = state
        module(step)
        steps.append(step["hidden"])
        state = step["next", "recurrent_state"]
    steps = torch.stack(steps, 1)

    w_ih, w_hh, b_ih, b_hh = module.rnn.all_weights[0]
    f, alpha = (torch.relu, 0.3) if options else (torch.tanh, 1.0)
    h, states = rollout["recurrent_state"][:, 0, 0], []
    for t in range(T):
        h = torch.where(rollout["is_init"][:, t], 0, h)
        z = rollout["observation"][:, t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh
        h = (1 - alpha) * h + alpha * f(z)
        states.append(h)
    loop = torch.stack(states, 1)

    expected = gradients(loop, module)
    for name, hidden in (("whole", whole["hidden"]), ("steps", steps)):
        assert_same(name, hidden, loop)
        for mine, other in zip(gradients(hidden, module), expected, strict=True):
            assert_same(f"gradient of {name}", mine, other)


def test_a_step_in_any_shape(example, rollout):
    module = example["RNNModule"](example["FEATURES"], H).double()
    together = module(rollout.clone())["hidden"]
    for b in range(B):
        for t in range(T):
            assert_same("hidden", module(rollout[b, t].clone())["hidden"], together[b, t])


def test_what_was_collected_step_by_step_is_what_the_loss_sees(example):
    """Across rollouts: the second one goes on from the state that the first one left."""
    from torchrl.collectors import Collector
    from torchrl.envs import InitTracker, TransformedEnv
    from torchrl.modules import set_recurrent_mode

    torch.manual_seed(0)
    policy = example["make_policy"](H)
    env = TransformedEnv(example["Recall"](B, 2, 7, seed=0), InitTracker())
    env = env.append_transform(policy[0][0].make_tensordict_primer())
    collector = Collector(env, policy, frames_per_batch=B * T, total_frames=2 * B * T)
    rollouts = list(rollout.clone() for rollout in collector)
    collector.shutdown()
    assert not rollouts[1]["is_init"][:, 0].all()
    for rollout in rollouts:
        assert rollout["is_init"][:, 1:].any()
        with set_recurrent_mode(True), torch.no_grad():
            again = policy[0](rollout.clone())
        # The same float32 operations on other shapes: fewer than 2 T (4 + H) roundings of states
        # below 1, which a step of these small weights does not amplify.
        limit = 2 * T * (4 + H) * 2**-24
        for name in ("hidden", "logits"):
            torch.testing.assert_close(again[name], rollout[name], rtol=0, atol=limit)
    first, second = rollouts
    carried = first["next", "recurrent_state"][:, -1].clone()
    carried[second["is_init"][:, 0, 0]] = 0
    assert torch.equal(second["recurrent_state"][:, 0], carried)


def test_the_environment_is_what_it_says(example):
    from torchrl.envs.utils import check_env_specs

    env = example["Recall"](50, 3, 5, seed=0)
    check_env_specs(env)
    rollout = env.rollout(20, break_when_any_done=False)
    observation, done = rollout["observation"], rollout["next", "done"].squeeze(-1)
    lengths = set()
    for row in range(50):
        begin = 0
        for end in done[row].nonzero().flatten().tolist():
            episode = observation[row, begin : end + 1]
            lengths.add(len(episode))
            cue = episode[0, :2]
            assert cue.sum() == 1
            assert not episode[1:, :2].any()
            assert episode[:, 3].tolist() == [0.0] * (len(episode) - 1) + [1.0]
            right = rollout["action"][row, end] == cue.argmax()
            rewards = rollout["next", "reward"][row, begin : end + 1, 0]
            assert rewards.tolist() == [0.0] * (len(episode) - 1) + [float(right)]
            begin = end + 1
    assert lengths == {3, 4, 5}


def test_the_loss_is_the_score_of_the_actions_at_the_signal(example):
    env = example["Recall"](4, 2, 4, seed=1)
    from torchrl.envs import InitTracker, TransformedEnv

    policy = example["make_policy"](H)
    env = TransformedEnv(env, InitTracker())
    env = env.append_transform(policy[0][0].make_tensordict_primer())
    torch.manual_seed(0)
    rollout = env.rollout(12, policy, break_when_any_done=False)
    expected, count = 0.0, 0
    for row in range(4):
        for t in range(12):
            if rollout["next", "done"][row, t]:
                score = torch.log_softmax(rollout["logits"][row, t], 0)[rollout["action"][row, t]]
                expected -= score.item() * (rollout["next", "reward"][row, t].item() - 0.5)
                count += 1
    got = example["loss_of"](policy, rollout).item()
    assert abs(got - expected / count) < 1e-5  # float32, a mean of numbers below 1


WRONG = {
    "T": ("--T 0", "argument --T: invalid count value: '0'"),
    "lengths": ("--shortest 9 --longest 8", "--shortest must be at most --longest 8, got 9"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind):
    options, message = WRONG[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
