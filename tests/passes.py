"""Passes of any size taken as those that hold much, or as those that hold nothing."""

from torch_dropout_ir.regularizers import clean_pass, recorder, step_memory


def take_in_parts(monkeypatch, parts=True):
    """Let no graph be kept that is larger than a step's, which none is then, or any."""
    monkeypatch.setattr(clean_pass, "_FEWEST_ELEMENTS", 0 if parts else 2**62)
    monkeypatch.setattr(step_memory, "SHARE", 0 if parts else 2**62)
    monkeypatch.setattr(step_memory, "LEAST", 0)
    monkeypatch.setattr(recorder.Recorder, "SOME", 0 if parts else 2**62)
