"""examples/perceptual_decision.py: a run that learns, as a user starts it, and its parts alone.

To add a wrong request, add a line to BAD_OPTIONS.
"""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scripts
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SCRIPT = scripts.EXAMPLES / "perceptual_decision.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module, for the tests of its parts."""
    spec = importlib.util.spec_from_file_location("perceptual_decision", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# --- a run from beginning to end ------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One --quick run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("decision")
    return out, scripts.run(SCRIPT, "--quick", "--threads", 1, "--out", out).stdout


def test_it_learns_the_task(finished: tuple[Path, str]) -> None:
    rows = re.findall(r"^ *([\d.]+)% +([\d.]+)% +([\d.]+)%$", finished[1], re.MULTILINE)
    coherence, correct, ideal = np.array(rows, dtype=float).T
    assert list(coherence) == [3.2, 6.4, 12.8, 25.6, 51.2]
    assert correct[-1] > 95
    assert (np.diff(correct) > 0).all(), f"not monotone: {correct}"
    fixates = re.search(r"it fixates in ([\d.]+)% of the steps", finished[1])
    assert float(fixates[1]) > 90  # it takes some steps after the mark came on
    # 1000 trials each: nobody beats the ideal observer by more than chance, four standard errors.
    error = 100 * np.sqrt(0.25 / 1000)
    assert (correct < ideal + 4 * error).all(), f"{correct} against {ideal}"


def test_it_reports(finished: tuple[Path, str]) -> None:
    _, stdout = finished
    assert "of 40 units all 1960 weights are >= 0, of 10 units all 490 are <= 0" in stdout
    assert re.search(r"the loops agree: states and all 6 gradients, to \de-0\d relative", stdout)
    assert re.search(r"speed-up: \d+\.\d times", stdout)
    assert re.search(r"logistic fit: slope \d+\.\d, so 75 % correct at \d+\.\d%", stdout)
    assert len(stdout.splitlines()) < 40, "a log must not be flooded"


def test_it_draws(finished: tuple[Path, str]) -> None:
    from matplotlib import image

    pixels = image.imread(finished[0] / "perceptual_decision.png")  # (height, width, 4), 0 to 1
    assert min(pixels.shape[:2]) > 800
    half = pixels.shape[1] // 2
    for colour, where in {"c8102e": pixels, "1f6fb4": pixels[:, :half]}.items():
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert (abs(where[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 300, colour


# --- the task -------------------------------------------------------------------------------------


def test_a_trial_is_what_it_says(example: ModuleType) -> None:
    trials = example.Trials.draw(torch.tensor([0.512, 0.0] * 50), noise=0.0)
    assert trials.stimulus.shape == (200, 100, 3)
    mark, left, right = trials.stimulus.unbind(-1)
    go = mark.sum(0)  # steps for which the mark is on, from the first step without a gap
    assert (mark.diff(dim=0) <= 0).all()
    assert set(go.tolist()) <= set(range(140, 171))
    assert len(set(go.tolist())) > 20
    # Dots from 200 to 1200 ms; the two streams add up to 1 and differ by the signed coherence.
    assert not torch.cat([left[:20], left[120:], right[:20], right[120:]]).any()
    assert torch.allclose(left[20:120] + right[20:120], torch.ones(100, 100))
    assert torch.allclose(right[20:120] - left[20:120], trials.coherence.expand(100, -1))
    assert torch.equal(trials.coherence > 0, trials.rightward & (trials.coherence != 0))

    for trial in range(100):
        answer = example.RIGHT if trials.rightward[trial] else example.LEFT
        on = int(go[trial])
        assert trials.target[:, trial].tolist() == [example.FIXATE] * on + [answer] * (200 - on)
        counts = trials.counts[:, trial]
        assert (counts[:on] == torch.tensor(example.FIXATION_COUNTS)).all()
        assert not counts[on : on + 10].any(), "100 ms of grace"
        assert (counts[on + 10 :] == 1).all()
    assert 30 < trials.rightward.sum() < 70


def test_the_ideal_observer_is_one_who_adds_up(example: ModuleType) -> None:
    for strength in (0.032, 0.128):
        trials = example.Trials.draw(torch.full((4000,), strength))
        evidence = (trials.stimulus[..., example.RIGHT] - trials.stimulus[..., example.LEFT]).sum(0)
        correct = ((evidence > 0) == trials.rightward).float().mean().item()
        expected = example.ideal_observer(torch.tensor(strength)).item()
        assert abs(correct - expected) < 4 * math.sqrt(0.25 / 4000)  # four standard errors


# --- the network ----------------------------------------------------------------------------------


def test_dale_gives_every_unit_one_sign(example: ModuleType) -> None:
    network = example.RateNetwork(20)
    initial = network.rnn.weight_hh_l0.detach()
    radius = np.abs(np.linalg.eigvals(initial.double().numpy())).max()
    assert radius == pytest.approx(example.SPECTRAL_RADIUS, rel=1e-5)

    optimizer = torch.optim.SGD(network.parameters(), 1.0)  # steps that drive V through zero
    for _ in range(3):
        optimizer.zero_grad()
        network.rnn.weight_hh_l0.square().sum().backward()
        optimizer.step()
        network.rnn.parametrizations.weight_hh_l0.original.data.sub_(0.05)
    weight = network.rnn.weight_hh_l0.detach().numpy()
    assert not np.array_equal(weight, initial.numpy())
    assert (network.rnn.parametrizations.weight_hh_l0.original < 0).any()
    assert (weight[:, :16] >= 0).all()
    assert (weight[:, 16:] <= 0).all()
    assert not weight.diagonal().any()
    assert (network.readout.weight[:, :16] > 0).all()
    assert not network.readout.weight[:, 16:].any()
    assert (network.rnn.weight_ih_l0 >= 0).all()


@pytest.mark.parametrize("loop", [False, True])
def test_states_are_those_of_the_equation(example: ModuleType, loop: bool) -> None:
    """Against numpy, in float64: 200 steps of sums of at most 20 terms stay within 1e-12."""
    network = example.RateNetwork(20, loop=loop).double().eval()
    stimulus = example.Trials.mixed(3).stimulus.double()
    logits, rates = network(stimulus)
    rnn = network.rnn
    weight_ih, weight_hh = (w.detach().numpy() for w in (rnn.weight_ih_l0, rnn.weight_hh_l0))
    bias = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach().numpy()
    readout, offset = network.readout.weight.detach().numpy(), network.readout.bias.detach().numpy()
    r = np.zeros((3, 20))
    for t, u in enumerate(stimulus.numpy()):
        z = u @ weight_ih.T + r @ weight_hh.T + bias
        r = 0.9 * r + 0.1 * np.maximum(z, 0)
        np.testing.assert_allclose(rates[t].detach().numpy(), r, rtol=0, atol=1e-12)
        expected = r @ readout.T + offset
        np.testing.assert_allclose(logits[t].detach().numpy(), expected, rtol=0, atol=1e-12)
    assert rates.max() > 0.1, "a silent network would agree with anything"


@pytest.mark.parametrize("loop", [False, True])
def test_the_noise_is_inside_f(example: ModuleType, loop: bool) -> None:
    """Units without input or synapses: relu of the noise, filtered.

    Their mean is s / sqrt(2 pi) (1 - 0.9^t), known from 200 x 100 units that are independent to
    s sqrt(a / (2 - a)) / sqrt(20000): four times that is the bound.
    """
    rnn = example.RateNetwork(100, loop=loop).rnn
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rates, _ = rnn(torch.zeros(200, 200, 3))
    s = math.sqrt(2 / 0.1) * 0.05
    bound = 4 * s * math.sqrt(0.1 / 1.9) / math.sqrt(20000)
    assert abs(rates[-1].mean().item() - s / math.sqrt(2 * math.pi)) < bound
    assert not rnn.eval()(torch.zeros(200, 200, 3))[0].any()


def test_the_answer_and_the_loss_read_the_right_period(example: ModuleType) -> None:
    trials = example.Trials.draw(torch.zeros(2))
    trials.rightward[:] = torch.tensor([True, False])
    go = trials.stimulus[..., example.FIXATE].sum(0).int()
    trials.target = torch.zeros_like(trials.target)
    logits = torch.zeros(200, 2, 3)
    for trial, side in enumerate((example.RIGHT, example.LEFT)):
        trials.target[go[trial] :, trial] = side
        logits[: go[trial] + 10, trial, 3 - side] = 99.0  # before, and in the grace period: wrong
        logits[go[trial] + 10 :, trial, side] = 1.0
    assert example.answer(logits, trials).tolist() == [True, False]

    expected = weights = 0.0
    for t in range(200):
        for trial in range(2):
            p = np.exp(logits[t, trial].double().numpy())
            loss = -np.log(p[trials.target[t, trial]] / p.sum())
            expected += loss * trials.counts[t, trial].item()
            weights += trials.counts[t, trial].item()
    # 400 terms of float32: eps (1 + ceil(log2 400)) relative.
    bound = 10 * torch.finfo(torch.float32).eps
    assert example.loss_of(logits, trials).item() == pytest.approx(expected / weights, rel=bound)


def test_checks_can_fail(example: ModuleType, capsys: pytest.CaptureFixture) -> None:
    network, loop = example.RateNetwork(20), example.RateNetwork(20, loop=True)
    loop.load_state_dict(network.state_dict())
    trials = example.Trials.mixed(4)
    assert example.check_agreement(network, loop, trials).startswith("the loops agree")
    handle = network.rnn.bias_hh_l0.register_hook(lambda grad: 1.001 * grad)
    with pytest.raises(SystemExit) as exit:
        example.check_agreement(network, loop, trials)
    assert exit.value.code == 1
    assert "the loops disagree: rnn.bias_hh_l0 by" in capsys.readouterr().err
    handle.remove()

    weight = network.rnn.weight_hh_l0.detach().clone()
    assert example.check_dale(weight, 16).startswith("Dale's law holds")
    weight[3, 17] = 0.1
    with pytest.raises(SystemExit) as exit:
        example.check_dale(weight, 16)
    assert exit.value.code == 1
    assert "Dale's law is broken: 1 of 400 weights" in capsys.readouterr().err


# --- what was learned -----------------------------------------------------------------------------


def test_the_logistic_fit_is_the_maximum_of_the_likelihood(example: ModuleType) -> None:
    coherence = torch.linspace(-0.5, 0.5, 11)
    count = torch.full((11,), 1000.0)
    slope, bias = example.fit_logistic(coherence, torch.sigmoid(9 * coherence - 0.5), count)
    # The fractions are rounded to float32.
    assert (slope, bias) == (pytest.approx(9, rel=1e-5), pytest.approx(-0.5, rel=1e-5))
    assert example.fit_logistic(coherence, torch.zeros(11), count) is None
    assert example.fit_logistic(coherence, (coherence > 0.01).float(), count) is None


def test_the_psychometric_curve_counts_answers(example: ModuleType) -> None:
    observed = []
    for strength in (0.0, 0.5):
        trials = example.Trials.draw(torch.full((40,), strength))
        said = torch.rand(40) < 0.7
        observed.append(example.Behaviour(strength, trials, said, 1.0, torch.zeros(200, 40, 5)))
    coherence, rightward, count = example.psychometric(observed)
    assert coherence.tolist() == [-0.5, 0.0, 0.5]
    assert count.sum() == 80
    assert count[1] == 40
    assert rightward[1] == pytest.approx(observed[0].rightward.float().mean().item())
    went_right = observed[1].trials.coherence > 0
    assert rightward[2] == pytest.approx(observed[1].rightward[went_right].float().mean().item())


def test_rates_by_choice_are_means_over_trials_and_units(example: ModuleType) -> None:
    """Against sums with a loop over trials and units: float64, so 1e-12 is rounding."""
    trials = example.Trials.draw(torch.full((40,), 0.5))
    said = torch.rand(40) < 0.5
    rates = torch.rand(200, 30, 6, dtype=torch.float64)  # those of 10 trials were not kept
    behaviour = example.Behaviour(0.5, trials, said, 1.0, rates)
    units = torch.tensor([True, True, True, True, False, False])
    right = torch.tensor([True, False, True, False, True, False])
    found = example.rates_by_choice(behaviour, units, right)
    for preferred, mean in zip((True, False), found, strict=True):
        chosen = [
            rates[:, trial, unit].numpy()
            for trial in range(15, 30)
            for unit in range(4)
            if said[trial] == trials.rightward[trial]
            if (said[trial] == right[unit]) == preferred
        ]
        np.testing.assert_allclose(mean.numpy(), np.mean(chosen, axis=0), rtol=1e-12)

    behaviour.rightward = ~trials.rightward
    assert example.rates_by_choice(behaviour, units, right) == (None, None), "all are wrong"


def test_units_that_prefer_right(example: ModuleType) -> None:
    trials = example.Trials.draw(torch.full((40,), 0.5))
    trials.coherence[:12] = 0.5  # more trials to the right than to the left
    rates = torch.ones(200, 40, 2)
    rates[20:120, :, 0] += trials.coherence
    rates[20:120, :, 1] -= trials.coherence
    behaviour = example.Behaviour(0.5, trials, trials.rightward, 1.0, rates)
    assert example.preferring_right([behaviour]).tolist() == [True, False]


# --- the command line -----------------------------------------------------------------------------

BAD_OPTIONS = {  # options, what the message says
    "units": ("--units 12", "argument --units: must be a multiple of 5 (4 E : 1 I), got 12"),
    "steps": ("--steps 0", "argument --steps: invalid count value: '0'"),
    "seed": ("--seed -1", "argument --seed: invalid natural value: '-1'"),
    "unknown": ("--speed 9", "unrecognized arguments: --speed 9"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options(kind: str) -> None:
    options, message = BAD_OPTIONS[kind]
    assert message in scripts.error_of(SCRIPT, *options.split())
