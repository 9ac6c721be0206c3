"""Records out of TensorBoard's data provider, as what JSON can hold."""

import base64
import io
import json
import math

from tensorboard.data.provider import RunTagFilter

_OURS = tuple("condensation/ cost/ demo/ loss/ mask/ regularizer/ sharpness/".split())
_CALLS = {  # kind -> the provider's name of it, most points of a tag
    "scalars": ("scalars", 500),
    "histograms": ("tensors", 100),
    "images": ("blob_sequences", 500),
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
        for kind, (name, _) in _CALLS.items():
            listed = getattr(provider, f"list_{name}")(plugin_name=kind, **about)
            for run, tags in listed.items():
                for tag in (tag for tag in tags if tag.startswith(_OURS)):
                    found[kind].setdefault(tag, []).append(run)
                    said.setdefault("/".join(tag.split("/")[:2]), tags[tag].description)
        return {"runs": runs, "said": said, **found}
    (name, most), chosen = _CALLS[route], RunTagFilter(tags=[of[0]])
    about |= {"plugin_name": route, "downsample": most, "run_tag_filter": chosen}
    read = getattr(provider, f"read_{name}")(**about)
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
    sound = bins.shape[1:] == (3,) and bins.size and math.isfinite(bins.sum())
    return [*bins[[0, -1], [0, 1]].tolist(), bins[:, 2].tolist()] if sound else None


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
        scale = {key: float(said[key]) for key in ("low", "high", "levels")}
        sound = cells.size and cells.shape == (rows, columns)
        if not (sound and all(map(math.isfinite, scale.values()))):
            raise ValueError("the field or its scale is not what the picture says")
        names = [str(name) for name in said["names"]]
        field = {"cells": base64.b64encode(cells.tobytes()).decode(), "names": names}
        return {"rows": rows, "columns": columns} | field | scale
    except Exception as err:
        return {"error": f"Not a picture of ours ({type(err).__name__})."}
