"""Two training runs side by side, and what came of them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_dropout_ir import condensation, regularizers, sharpness
from torch_dropout_ir.analysis import Analysis, Record, Snapshot
from torch_dropout_ir.analysis.measures import default_measures
from torch_dropout_ir.analysis.snapshot import Need
from torch_dropout_ir.attach import attach_analysis
from torch_dropout_ir.demo.data import Data, Settings, load
from torch_dropout_ir.losses import half_squared_error

_SMALL = 10**7
SLICE_ALPHAS = torch.linspace(-1, 1, 41, device="cpu")


@dataclasses.dataclass
class Outcome:
    """What one run left.

    Attributes:
        name: ``"without dropout"`` or ``"with dropout"``.
        numbers: The table's column, by row.
        points: Step, test accuracy and R_1 along training.
        cosines: Cosines between hidden neurons, sorted, ``[m, m]``.
        slice: Loss along one random filter-normalized direction.
    """

    name: str
    numbers: dict[str, float]
    points: list[tuple[int, float, float]]
    cosines: Tensor
    slice: Tensor


class Progress:
    """Test accuracy, and R_1 at the same ``p`` for both runs.

    A measure like those of the library: a network trained without dropout has an R_1
    too, that of the dropout that it could be given.
    """

    name = "progress"
    needs: frozenset[Need] = frozenset()

    def __init__(self, data: Data, p: float) -> None:
        self.data = data
        self.p = p

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``demo/test_accuracy`` and ``demo/R1_at_p``."""
        net = snapshot.model
        assert isinstance(net, nn.Sequential)
        tested, r1 = self.numbers(net)
        return {"demo/test_accuracy": tested, "demo/R1_at_p": r1}

    @torch.no_grad()
    def numbers(self, net: nn.Sequential) -> tuple[float, float]:
        """Return test accuracy and R_1."""
        return accuracy(net, self.data), r1_at(net, self.data, self.p)


def features(net: nn.Sequential, x: Tensor) -> Tensor:
    """Return the inputs of the last layer, without dropout."""
    return torch.relu(net[0](x))


def accuracy(net: nn.Sequential, data: Data) -> float:
    """Return the share of test images classified rightly, without dropout."""
    x, labels = data.test
    guesses = net[3](features(net, x)).argmax(1)
    return float((guesses == labels).float().mean())


def r1_at(net: nn.Sequential, data: Data, p: float) -> float:
    """Return R_1 of dropout with ``p`` before the last layer, in closed form."""
    h = features(net, data.train[0])
    weight = net.get_parameter("3.weight")
    value = regularizers.last_layer(h, weight, p, loss=half_squared_error)
    return float(value)


def network(settings: Settings, inputs: int, p: float) -> nn.Sequential:
    """Return the two-layer network at its start, the same for both runs."""
    torch.manual_seed(settings.seed)
    net = nn.Sequential(
        nn.Linear(inputs, settings.width),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(settings.width, 10),
    )
    for x in net.parameters():
        nn.init.normal_(x, std=settings.std)
    return net


def train(settings: Settings, data: Data, p: float, log_dir: Path) -> Outcome:
    """Train one network with the analysis attached and measure what came of it."""
    from tqdm import tqdm  # an extra

    name = "with dropout" if p else "without dropout"
    x, y = data.train
    net = network(settings, x.shape[1], p)
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.lr)
    progress = Progress(data, settings.p)
    measures = [*default_measures(), progress]
    drawn = {round(settings.steps ** (i / 60)) - 1 for i in range(61)}
    points: list[tuple[int, float, float]] = []
    with attach_analysis(
        net,
        half_squared_error,
        log_dir=log_dir,
        data=(x, y),
        convert=True,
        measures=measures,
    ) as analysis:
        for step in tqdm(range(settings.steps), desc=f"{name:>15}", unit="step"):
            if step in drawn:
                points.append((step, *progress.numbers(net)))
            loss = half_squared_error(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _check_finite(net, settings)
        analysis.measure()
        points.append((settings.steps, *progress.numbers(net)))
        return _outcome(name, settings, data, net, analysis, points)


def _check_finite(net: nn.Module, settings: Settings) -> None:
    if not all(bool(torch.isfinite(x).all()) for x in net.parameters()):
        raise ValueError(
            f"training diverged with --lr {settings.lr} and --std {settings.std}: "
            "choose a smaller learning rate"
        )


def _outcome(
    name: str,
    settings: Settings,
    data: Data,
    net: nn.Sequential,
    analysis: Analysis,
    points: list[tuple[int, float, float]],
) -> Outcome:
    torch.manual_seed(settings.seed)
    weights = condensation.input_weights(net[0]).detach()
    op = sharpness.hessian(net, half_squared_error, data.train)
    top = sharpness.top_eigenvalues(op)
    trace = sharpness.trace(op, num_matvecs=100)
    r2 = regularizers.gradient_norm(
        net, data.train, half_squared_error, lr=settings.lr, num_masks=32
    )
    with torch.no_grad():
        numbers = {
            "test accuracy (%)": 100 * accuracy(net, data),
            "R_S": analysis.latest["loss/R_S"],
            f"R_1 at p={settings.p:g}": r1_at(net, data, settings.p),
            "R_2": float(r2.value),
            "R_2 standard error": float(r2.standard_error),
            "effective ratio": condensation.effective_neurons(weights).ratio,
            "top Hessian eigenvalue": float(top.values[0]),
            "residual": float(top.residuals[0]),
            "trace of the Hessian": float(trace.value),
            "trace standard error": float(trace.standard_error),
        }
    order = condensation.cluster_order(weights)
    direction = sharpness.filter_normalized_direction(net)
    return Outcome(
        name,
        numbers,
        points,
        condensation.cosine_similarity(weights[order]),
        sharpness.loss_slice(
            net, half_squared_error, data.train, SLICE_ALPHAS, direction
        ),
    )


def run_demo(settings: Settings) -> str:
    """Return what the demonstration prints: table, picture's path and the line to type.

    Raises:
        ValueError: If the settings do not fit the data, or training diverges.
        OSError: If data cannot be read or results not written.
    """  # noqa: DOC502 (raised by what it calls)
    from torch_dropout_ir.demo.report import draw, table

    _check_writable(settings.log_dir)
    data = load(settings.data_root, settings.components)
    started = time.perf_counter()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    with _threads_for(data, settings):
        outcomes = [
            train(settings, data, p, settings.log_dir / f"{stamp}-{name}")
            for p, name in ((0.0, "without-dropout"), (settings.p, "with-dropout"))
        ]
    seconds = time.perf_counter() - started
    picture = settings.log_dir / f"{stamp}.png"
    draw(outcomes, settings, data, picture)
    return table(outcomes, settings, data, seconds, picture)


@contextlib.contextmanager
def _threads_for(data: Data, settings: Settings) -> Iterator[None]:
    """One thread for small products: waiting for a second costs more than it brings."""
    before = torch.get_num_threads()
    small = data.train[0].numel() * settings.width < _SMALL
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as err:
        raise type(err)(
            f"--log-dir: cannot write to {directory} ({err.strerror}); choose another"
        ) from err
