"""A callback for Hugging Face's ``Trainer``; needs ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_dropout_ir.analysis import Analysis
from torch_dropout_ir.analysis.view import by_itself
from torch_dropout_ir.attach import attach_analysis

try:
    from transformers import TrainerCallback
except ImportError as err:
    raise ImportError(
        "torch_dropout_ir.integrations.transformers: expected Hugging Face's "
        "transformers to be installed, got none: pip install transformers"
    ) from err

_FILE = "torch_dropout_ir.pt"


def models_own_loss(outputs: Any, targets: Any) -> Tensor:
    """Return the loss that the model computes of the ``labels`` it is called with."""
    del targets  # the model has them
    named = isinstance(outputs, dict)
    loss: Tensor | None = (
        outputs.get("loss") if named else getattr(outputs, "loss", None)
    )
    if loss is None:
        raise ValueError(
            "DropoutAnalysis: expected a model that computes its loss of the `labels` "
            "it is called with, got outputs without one (with `compute_loss_func` the "
            "trainer does). Pass `loss=` and `data=`, or call `attach_analysis(model)` "
            "in place of this callback: it follows the trainer's loss."
        )
    return loss


class DropoutAnalysis(TrainerCallback):
    """Attaches an analysis while a ``Trainer`` trains.

    Curves and schedule are saved beside the trainer's checkpoints, and taken up where
    it resumes from one. Of accumulated passes the last one is measured, over its
    share of the items: on average that is the loss of all.

    Args:
        loss: As in :func:`attach_analysis`; None: the model's own, of ``labels``, or
            the trainer's with ``label_smoothing_factor``.
        log_dir: A TensorBoard run directory; None: ``<output_dir>/dropout_ir``; False:
            none.
        **options: Further arguments of :func:`attach_analysis`.

    Attributes:
        analysis: The analysis, from the start of training on.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data)
        >>> trainer.add_callback(DropoutAnalysis(every=50))
        >>> trainer.train()
    """

    def __init__(self, loss: Any = None, *, log_dir: Any = None, **options: Any):
        self.analysis: Analysis | None = None
        self._loss = models_own_loss if loss is None else loss
        self._log_dir = log_dir
        self._options = options

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach, with the state of the checkpoint that training goes on from."""
        log_dir = self._log_dir
        if log_dir is None:
            log_dir = Path(args.output_dir) / "dropout_ir"
        if not state.is_world_process_zero:
            log_dir = False
        self._detach()  # of a run that an exception has ended
        loss = self._loss
        if loss is models_own_loss and args.label_smoothing_factor:
            loss = None  # the trainer computes it, and is followed
        self.analysis = attach_analysis(model, loss, log_dir=log_dir, **self._options)
        together = args.world_size if args.average_tokens_across_devices else 1
        self.analysis.inputs_of = lambda inputs, passes: by_itself(
            inputs, passes * together
        )
        saved = self._checkpoint(args, state) / _FILE
        if state.global_step and saved.exists():
            self.analysis.load_state_dict(torch.load(saved, weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the analysis beside the checkpoint."""
        folder = self._checkpoint(args, state)
        if self.analysis is not None and state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.analysis.state_dict(), folder / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self.analysis is not None:
            self.analysis.detach()

    @staticmethod
    def _checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
