"""A Lightning callback; needs ``lightning`` or ``pytorch_lightning``."""

from __future__ import annotations

import operator
import weakref
from typing import Any

from torch import nn

from torch_dropout_ir.analysis import Analysis
from torch_dropout_ir.attach import attach_analysis
from torch_dropout_ir.inputs import Inputs

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning import LightningModule
        from pytorch_lightning.callbacks import Callback
    except ImportError as err:
        raise ImportError(
            "torch_dropout_ir.integrations.lightning: expected Lightning to be "
            "installed, got none: pip install lightning"
        ) from err


class DropoutAnalysis(Callback):
    """Attaches an analysis while Lightning's trainer fits.

    The batch's second element is taken for the targets where the first one is what the
    model was called with. Curves and schedule go with Lightning's checkpoints.

    Args:
        loss: As in :func:`attach_analysis`.
        module: Name of the module that ``training_step`` calls, ``"net"`` for
            ``self.net(x)``; empty for the LightningModule itself, or, where that has no
            ``forward``, for the only child that has parameters.
        log_dir: A TensorBoard run directory; None: the trainer's; False: none.
        **options: Further arguments of :func:`attach_analysis`.

    Attributes:
        analysis: The analysis, from the start of a fit on.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[DropoutAnalysis(every=50)])
        >>> trainer.fit(module, loader)
    """

    def __init__(
        self, loss: Any = None, *, module: str = "", log_dir: Any = None, **options: Any
    ) -> None:
        super().__init__()
        self.analysis: Analysis | None = None
        self._loss = loss
        self._module = module
        self._log_dir = log_dir
        self._options = options
        self._state: dict[str, Any] | None = None
        self._batch: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, with the state of the checkpoint or fit that this one goes on from.

        Where the trainer has made no step, curves begin anew.
        """
        log_dir = trainer.log_dir if self._log_dir is None else self._log_dir
        model = self._model(trainer, pl_module)
        self.analysis = attach_analysis(
            model, self._loss, log_dir=log_dir, **self._options
        )
        here = weakref.ref(self)

        def targets_of(inputs: Inputs) -> Any:
            callback = here()
            return None if callback is None else callback._targets(inputs)

        self.analysis.targets_of = targets_of
        if self._state is not None and trainer.global_step:
            self.analysis.load_state_dict(self._state)

    def _model(self, trainer: Any, pl_module: nn.Module) -> nn.Module:
        if self._module:
            found: nn.Module = operator.attrgetter(self._module)(pl_module)
            return found
        wrapped: nn.Module = trainer.model
        if type(pl_module).forward is not LightningModule.forward:
            return wrapped
        trained = [m for m in pl_module.children() if any(True for _ in m.parameters())]
        return trained[0] if len(trained) == 1 else wrapped

    def _targets(self, inputs: Inputs) -> Any:
        batch = self._batch
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        called = pair and bool(inputs.args) and inputs.args[0] is batch[0]
        return batch[1] if called else None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch of the step."""
        self._batch = batch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        self._batch = None
        if self.analysis is not None:
            self._state = self.analysis.state_dict()
            self.analysis.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return curves, counts and schedule, for the checkpoint."""
        return {} if self.analysis is None else self.analysis.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the fit starts."""
        self._state = state_dict or None
