"""Records out of TensorBoard's data provider, as what JSON can hold."""

import base64
import io
import json
import math

from tensorboard.data.provider import RunTagFilter

_OURS = tuple("condensation/ cost/ demo/ loss/ mask/ regularizer/ sharpness/".split())
_CALLS = {  # kind -> how to list, how to read, most points of a tag
    "scalars": ("list_scalars", "read_scalars", 500),
    "histograms": ("list_tensors", "read_tensors", 100),
    "images": ("list_blob_sequences", "read_blob_sequences", 500),
}
ROUTES = ("index", "picture", *_CALLS)


def answer(provider, context, experiment, route, *of):
    """Return the index; points ``[step, value]`` by run; or a picture by its key."""
    if route == "picture":
        return picture(provider.read_blob(context, blob_key=of[0]))
    about = {"ctx": context, "experiment_id": experiment}
    if route == "index":
        runs = sorted(run.run_name for run in provider.list_runs(**about))
        found, said = {kind: {} for kind in _CALLS}, {}  # said of tags, for all layers
        for kind, (listing, _, _) in _CALLS.items():
            listed = getattr(provider, listing)(plugin_name=kind, **about)
            for run, tags in listed.items():
                for tag in (tag for tag in tags if tag.startswith(_OURS)):
                    found[kind].setdefault(tag, []).append(run)
                    said.setdefault("/".join(tag.split("/")[:2]), tags[tag].description)
        return {"runs": runs, "said": said, **found}
    _, reading, most = _CALLS[route]
    chosen = RunTagFilter(tags=[of[0]])
    read = getattr(provider, reading)(
        plugin_name=route, downsample=most, run_tag_filter=chosen, **about
    )
    return {
        run: [[datum.step, _value(route, datum)] for datum in _made_last(series)]
        for run, tags in read.items()
        for series in tags.values()
    }


def _made_last(series):
    """The points without those of steps that were made again after a restart."""
    kept = []
    for datum in sorted(series, key=lambda datum: datum.wall_time)[::-1]:
        kept += [datum] if not kept or datum.step < kept[-1].step else []
    return kept[::-1]


def _value(route, datum):
    """A number; ``[left, right, counts]``; or a key. None: not what it should be."""
    if route == "scalars":
        return datum.value if math.isfinite(datum.value) else None
    if route == "images":
        return datum.values[2].blob_key if len(datum.values) > 2 else None
    bins = datum.numpy
    if bins.ndim != 2 or bins.shape[1] != 3 or not len(bins):
        return None
    ends = [float(bins[0, 0]), float(bins[-1, 1])]
    return [*ends, bins[:, 2].tolist()] if math.isfinite(bins.sum()) else None


def picture(png):
    """Return the field in a picture of ours, a byte a value, or why there is none."""
    try:
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(png), formats=["PNG"]) as file:
            if file.mode != "P" or file.width * file.height > 2**20:
                raise ValueError("no palette picture of this size is ours")
            said, pixels = json.loads(file.text["torch-dropout-ir"]), np.asarray(file)
        rows, columns, grow = (int(said[key]) for key in ("rows", "columns", "grow"))
        cells = pixels[: rows * grow : grow, : columns * grow : grow]
        if not cells.size or cells.shape != (rows, columns):
            raise ValueError("the field is not where the picture says")
        cells = base64.b64encode(cells.tobytes()).decode()
        names = [str(name) for name in said["names"]]
        ends = {key: float(said[key]) for key in ("low", "high", "levels")}
        if not all(map(math.isfinite, ends.values())):
            raise ValueError("a scale without ends")
        return {"rows": rows, "columns": columns, "names": names, "cells": cells} | ends
    except Exception as err:
        return {"error": f"Not a picture of ours ({type(err).__name__})."}
