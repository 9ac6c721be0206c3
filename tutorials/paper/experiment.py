"""What the scripts of this folder share: options, seeds, resuming, claims, the record.

A script is a list of cells, one for each arm of the experiment and seed. A cell is
computed once, its result kept under ``--out``, so that a run that was stopped goes on
where it was; that a cell is of older code than the script is said. What the paper
claims is then decided from the results of all seeds, by numbers alone, and written with
them to ``results/<figure>.json``.
"""

import ast
import functools
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from claims import VERDICTS, worst
from options import SEEDS, parse
from tqdm import tqdm

HERE = Path(__file__).parent
PROFILES = ("quick", "default", "paper")
# One colour for each arm, in every figure.
COLOURS = {
    "without": "#4d4d4d",
    "dropout": "#2166ac",
    "R1": "#b2182b",
    "R2": "#1b7837",
    "start": "#bdbdbd",
}


class Experiment:
    """The run of one script.

    Args:
        doc: The script's docstring: its help.
        figure: Its name, ``fig04`` for instance.
        options: Added to the script's own: ``(flags, keywords)`` of ``add_argument``.
        arguments: The command line's, if not those of the process.
        home: Folder whose ``results`` takes the numbers and the picture.
    """

    def __init__(self, doc, figure, options=(), arguments=None, home=HERE):
        self.options = parse(doc, options, arguments)
        self.profile = PROFILES[1 - self.options.quick + self.options.paper]
        self.title = doc.strip().splitlines()[0]
        self.figure = figure
        self.home = home
        self._older = []
        self.seeds = range(self.options.seeds)
        # A part of the experiment, or a look at it, leaves what is reported alone.
        self.whole = self.profile != "quick" and len(self.seeds) >= SEEDS
        self.folder = self.options.out / f"{figure}-{self.profile}"
        if self.options.restart and self.folder.is_dir():
            for path in self.folder.glob("*.pt"):
                path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)

    def pick(self, quick, default, paper):
        """The value of this profile."""
        return {"quick": quick, "default": default, "paper": paper}[self.profile]

    def log_dir(self, arm, seed):
        """Where the TensorBoard run of a cell goes."""
        return self.folder / "tensorboard" / f"{arm}-seed{seed}"

    def cell(self, arm, seed, compute):
        """``compute()``, or what it returned in an earlier run: tensors and numbers."""
        path, code = self._path(arm, seed), code_of(compute)
        if path.exists():
            kept = torch.load(path, weights_only=True)
            self._compare(path, kept.get("code", code), code)
            return kept["result"]
        torch.manual_seed(seed)
        self._before, self._began, self._code = 0.0, time.process_time(), code
        self._parts = []
        result = compute()
        _save({"result": result, "seconds": self._seconds(), "code": code}, path)
        for part in self._parts:
            part.unlink(missing_ok=True)
        return result

    def cells(self, arms, compute):
        """``{arm: [compute(arm, seed) for each seed]}``."""
        return {
            arm: [
                self.cell(arm, seed, functools.partial(compute, arm, seed))
                for seed in self.seeds
            ]
            for arm in arms
        }

    def steps(self, arm, seed, total, state) -> Iterator[int]:
        """Step numbers under a progress bar, from where the cell was stopped.

        Args:
            arm: The cell's arm.
            seed: The cell's seed.
            total: Number of steps.
            state: Objects with ``state_dict`` and ``load_state_dict``: model,
                optimizer, analysis, all that a step changes and a later one or the
                result reads. They and torch's generator are kept every half minute.

        Yields:
            The number of the step, from 0.
        """
        path, first = self._part(arm, seed), 0
        self._parts.append(path)
        if path.exists():
            kept = torch.load(path, weights_only=False)  # our own, of this run
            self._compare(path, kept.get("code", self._code), self._code)
            for one, saved in zip(state, kept["state"], strict=True):
                one.load_state_dict(saved)
            torch.set_rng_state(kept["rng"])
            first, self._before = kept["step"], kept["seconds"]
        last = time.perf_counter()
        bar = tqdm(
            range(first, total),
            initial=first,
            total=total,
            desc=f"{self.figure} {arm} seed {seed}",
            mininterval=1,
        )
        for step in bar:
            yield step
            # Not after the last: a run that goes on has a step to take, and with it
            # what the steps leave in local names.
            if (now := time.perf_counter()) - last > 30 and step + 1 < total:
                kept = {
                    "state": [one.state_dict() for one in state],
                    "rng": torch.get_rng_state(),
                    "step": step + 1,
                    "seconds": self._seconds(),
                    "code": self._code,
                }
                _save(kept, path)
                last = now

    def finish(self, claims, numbers=None, picture=None):
        """Write the claims and the numbers, print them; the picture's path is kept.

        Args:
            claims: A list of :class:`Claim`.
            numbers: What else the figure shows, as JSON holds it.
            picture: Its PNG.

        Returns:
            The verdict of the figure: its worst claim's.
        """
        verdict = self._said(worst(claims))
        records = [{**one.record, "verdict": self._said(one.verdict)} for one in claims]
        seconds = sum(
            torch.load(path, weights_only=True)["seconds"]
            for path in self.folder.glob("*-seed*.pt")
            if not path.name.endswith(".part.pt")
        )
        record = {
            "figure": self.figure,
            "title": self.title,
            "profile": self.profile,
            "seeds": len(self.seeds),
            "seconds": round(seconds),
            "verdict": verdict,
            "claims": records,
            "numbers": numbers or {},
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        path = self.results / f"{self.figure}.json"
        text = json.dumps(_finite(record), indent=1, ensure_ascii=False)
        path.write_text(text + "\n")
        print(f"\n{self.title} ({self.profile}, {len(self.seeds)} seeds)")
        for one in records:
            print("  {text}\n    paper {paper}, ours {ours}: {verdict}".format(**one))
        if self._older:
            print(f"of older code, see above: {', '.join(self._older)}")
        print(f"{verdict}\nnumbers: {path}")
        if picture is not None:
            print(f"picture: {picture}")
        return verdict

    @property
    def results(self):
        """Where numbers and pictures go."""
        if not self.whole:
            return self.folder
        path = self.home / "results"
        path.mkdir(exist_ok=True)
        return path

    @property
    def picture(self):
        """Path of the figure's PNG."""
        return self.results / f"{self.figure}.png"

    def _said(self, verdict):
        """A run that is cut short does not tell that something is not so."""
        short = self.profile == "quick" and verdict != VERDICTS[-1]
        return "a quick run cannot tell" if short else verdict

    def _path(self, arm, seed):
        return self.folder / f"{arm}-seed{seed}.pt"

    def _part(self, arm, seed):
        return self.folder / f"{arm}-seed{seed}.part.pt"

    def _compare(self, path, kept, now):
        """Say once, for each file, that cells were computed by an older one."""
        edited = sorted(name for name, code in now.items() if kept.get(name) != code)
        if edited:
            self._older.append(path.name)
        if len(self._older) == 1 and edited:
            print(
                f"{self.figure}: {path} was computed before {', '.join(edited)} was "
                "edited, and is used as it is; `--restart` computes all cells anew.",
                file=sys.stderr,
            )

    def _seconds(self):
        """Of one core, for the cell being computed, with those of stopped runs."""
        return self._before + time.process_time() - self._began


# Of no cell: how claims are judged and written, and options read, may change.
_WRITING = ("claims.py", "options.py", Path(__file__).name)


def code_of(compute):
    """Hashes of the code, by file name, that a cell's function is made of.

    Those are the function's own file and the files beside it that are imported, but
    this one and those of claims and options. Comments, docstrings and layout do not
    count.
    """
    function = getattr(compute, "func", compute)  # of a partial
    script = Path(function.__code__.co_filename).resolve()
    files = {Path(m.__file__) for m in list(sys.modules.values()) if _has_file(m)}
    beside = {one for one in files if one.parent == script.parent}
    return {
        one.name: hashlib.sha256(_without_words(one).encode()).hexdigest()[:16]
        for one in {script, *beside}
        if one.name not in _WRITING and one.is_file()
    }


def _has_file(module):
    return isinstance(getattr(module, "__file__", None), str)


def _without_words(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)


def _finite(value):
    """``value`` as JSON can hold it: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save(what, path):
    """Whole or not at all: a run may be stopped while it writes."""
    part = path.with_suffix(".tmp")
    torch.save(what, part)
    part.replace(path)
