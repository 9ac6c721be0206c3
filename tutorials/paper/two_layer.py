"""Two-layer networks of the paper's small figures, side by side, gradients by hand.

A step of one such network is mostly the cost of calling torch. Here the arms of an
experiment (without dropout, with it, with R_1 in the loss) are one tensor, and each is
also a torch module whose parameters are views of it, for the library to look at.
"""

import math

import torch
from torch import nn

import torch_dropout_ir as tdi
from torch_dropout_ir import condensation

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def normal(width, inputs=1, variance=None, generator=None):
    """A start ``[inputs + 2, 1, width]``: normal, of variance ``width ** -0.2``."""
    variance = width**-0.2 if variance is None else variance
    return torch.randn(inputs + 2, 1, width, generator=generator) * variance**0.5


class TwoLayer(nn.Module):
    """Networks ``sum_j a_j s(w_j x + b_j)``, trained on R_S, R_drop or R_S + R_1.

    Args:
        start: ``[inputs + 2, runs, width]``: w, b and a of each neuron.
        activation: ``"tanh"`` or ``"relu"``.
        dropped: ``(slice of runs, p)`` for those trained with dropout.
        regularized: ``(slice of runs, p)`` for those with R_1 in the loss.

    Attributes:
        state: All parameters, as ``start``; ``state.grad`` is their gradient.
        networks: One torch module a run; parameters and gradients are views.
    """

    def __init__(self, start, activation="tanh", dropped=(), regularized=()):
        super().__init__()
        self.state = start.clone()
        self.state.grad = torch.zeros_like(self.state)
        self.smooth = activation == "tanh"
        self.dropped, self.regularized = list(dropped), list(regularized)
        rates = [0.0] * start.shape[1]
        for where, p in (*self.dropped, *self.regularized):
            rates[where] = [p] * len(rates[where])
        self.networks = nn.ModuleList(
            self._network(run, p, ACTIVATIONS[activation]())
            for run, p in enumerate(rates)
        )
        self._kept = None

    def _network(self, run, p, activation):
        *_, inputs, width = self.state[:-2, run].shape
        first = nn.Linear(inputs, width, device="meta")
        last = nn.Linear(width, 1, bias=False, device="meta")
        for module, name, rows in (
            (first, "weight", lambda x: x[:-2, run].T),
            (first, "bias", lambda x: x[-2, run]),
            (last, "weight", lambda x: x[-1:, run]),
        ):
            parameter = nn.Parameter(rows(self.state))
            parameter.grad = rows(self.state.grad)
            setattr(module, name, parameter)
        return nn.Sequential(first, activation, nn.Dropout(p), last)

    @torch.no_grad()
    def gradient(self, x, y):
        """Put the gradient at ``x [n, inputs]``, ``y [n]`` into ``state.grad``.

        R_S is half the mean squared error, the paper's. Autograd gives the same (the
        tests compare) in three times the time.
        """
        n, (_, runs, width) = len(x), self.state.shape
        rows, reading, ones = self._prepared(x)
        h = reading @ self.state[:-1].flatten(1)
        h = h.sigmoid_().mul_(2.0).sub_(1.0) if self.smooth else h.clamp_min_(0)
        h, a = h.view(n, runs, width), self.state[-1]
        noise = [
            (where, tdi.dropout(part, p))
            for (where, p), part in zip(self.dropped, ones, strict=True)
        ]
        back = h * a
        _multiply(back, noise)
        residual = ((back.sum(2) - y[:, None]) * (1.0 / n))[:, :, None]
        found = self.state.grad
        read = torch.mul(h, residual, out=back)
        _multiply(read, noise)
        torch.sum(read, 0, out=found[-1])
        torch.mul(residual, a, out=back)
        _multiply(back, noise)
        for where, p in self.regularized:
            # R_1 = p / (2 (1 - p) n) sum h^2 a^2
            part, own, share = h[:, where], a[where], p / (1 - p) / n
            found[-1, where].addcmul_((part * part).sum(0), own, value=share)
            back[:, where].addcmul_(part, own * own, value=share)
        back = (
            back.addcmul_(back, h.mul_(h), value=-1.0)
            if self.smooth
            else back * (h > 0)
        )
        torch.mm(rows.T, back.view(n, -1), out=found[:-1].flatten(1))

    def _prepared(self, x):
        """``x`` with the constant appended, what z is read by, and ones for masks."""
        if self._kept is None or self._kept[0] is not x:
            rows = nn.functional.pad(x, (0, 1), value=1.0)
            ones = torch.ones(len(x), *self.state.shape[1:])
            masks = [ones[:, runs].contiguous() for runs, _ in self.dropped]
            # tanh(z) = 2 / (1 + exp(-2 z)) - 1: torch's sigmoid is fast, its tanh not.
            self._kept = x, rows, 2.0 * rows if self.smooth else rows, masks
        return self._kept[1:]

    @torch.no_grad()
    def forward(self, x):
        """Outputs of all runs with dropout off, ``[n, runs]``."""
        rows = nn.functional.pad(x, (0, 1), value=1.0)
        z = (rows @ self.state[:-1].flatten(1)).view(len(x), *self.state.shape[1:])
        h = z.tanh() if self.smooth else z.relu()
        return torch.einsum("nrm,rm->nr", h, self.state[-1])

    def risk(self, x, y):
        """R_S of each run, ``[runs]``."""
        return (self(x) - y[:, None]).square().mean(0) / 2


def _multiply(values, noise):
    for where, factors in noise:
        values[:, where] *= factors


class Track:
    """A curve: ``(step, *measure())`` in ``rows``, every ``every`` steps."""

    def __init__(self, every, measure):
        self.every, self.measure, self.rows = every, measure, []

    def __call__(self, step):
        """Add a row."""
        self.rows.append([step, *self.measure()])

    def state_dict(self):
        """What a run that goes on needs."""
        return {"rows": list(self.rows)}

    def load_state_dict(self, state):
        """Go on."""
        self.rows = state["rows"]


def train(
    exp, arm, seed, networks, data, steps, *, lr=1e-3, batch=None, arms=(), **how
):
    """Train with Adam, under a progress bar, resumable, watched by the analysis.

    Args:
        exp: The :class:`experiment.Experiment`.
        arm: Name of the cell.
        seed: Its seed.
        networks: A :class:`TwoLayer`, or another with ``gradient`` and ``networks``.
        data: ``(x, y)``.
        steps: Number of steps.
        lr: Learning rate; over the last tenth it falls to nothing, or the step at which
            Adam, which oscillates to the end, is stopped would decide the loss.
        batch: Samples of a step, drawn anew for each; all if None.
        arms: Names of the runs, for their TensorBoard logs; none are written without.
        how: ``settle`` is another share than a tenth, or False, which keeps ``lr`` to
            the end; ``track`` is a :class:`Track`.
    """
    # Adam's averages of a neuron that is silent at all points decay to denormals,
    # on which arithmetic is many times slower.
    torch.set_flush_denormal(True)
    x, y = data
    parameters = list(networks.parameters()) if arms else [networks.state]
    fused = all(one.is_contiguous() for one in parameters)
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=fused)
    watched = [
        tdi.attach_analysis(
            net,
            tdi.half_squared_error,
            optimizer=optimizer,
            log_dir=exp.log_dir(name, seed),
            every=max(1, steps // 4),
            data=(x, y[:, None]),
        )
        for net, name in zip(networks.networks, arms, strict=False)
    ]
    track, settle = how.get("track"), how.get("settle", 0.1)
    kept = [one for one in (networks, optimizer, track, *watched) if one is not None]
    for step in exp.steps(arm, seed, steps, kept):
        if track is not None and step % track.every == 0:
            track(step)
        if settle:
            left = 1 - step / steps
            optimizer.param_groups[0]["lr"] = lr * min(1, left * (1 / settle))
        if batch is None:
            networks.gradient(x, y)
        else:
            chosen = torch.randperm(len(x))[:batch]
            networks.gradient(x[chosen], y[chosen])
        optimizer.step()
    if track is not None:
        track(steps)
    for analysis in watched:
        analysis.measure()
        analysis.detach()
    torch.set_flush_denormal(False)
    return networks


@torch.no_grad()
def relative_amplitudes(net):
    """Amplitudes of a network's neurons over the largest."""
    size = condensation.amplitudes(condensation.input_weights(net[0]), net[-1].weight)
    return size / size.max()


def near(net, directions, angle=0.1):
    """Of the neurons above a tenth of the largest amplitude: near directions; all.

    Args:
        net: One of :attr:`TwoLayer.networks`.
        directions: ``[k, inputs + 1]``.
        angle: What near is, in radians.
    """
    large = relative_amplitudes(net) > 0.1
    weights = condensation.input_weights(net[0]).detach()[large]
    cosines, _ = condensation.closest(weights, directions)
    return int((cosines > math.cos(angle)).sum()), int(large.sum())


def show_orientations(panel, net, colour, directions, label=None, size=8):
    """Draw angle against amplitude of the neurons of one input, and directions."""
    for angle in condensation.orientation_angles(directions).tolist():
        panel.axvline(angle, color="#f4a582", lw=1.2, zorder=0)
    weights = condensation.input_weights(net[0]).detach()
    angles = condensation.orientation_angles(weights)
    panel.scatter(angles, relative_amplitudes(net), s=size, color=colour, label=label)
    panel.set(xlabel="orientation (rad)", xlim=(-math.pi, math.pi), ylim=(-0.05, 1.05))
