"""Statistics of the masks of a training run."""

from __future__ import annotations

from collections.abc import Mapping

from torch_dropout_ir.analysis.records import Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot


class Masks:
    """Keep rates and z-scores of the masks seen so far."""

    name = "masks"
    needs: frozenset[Need] = frozenset({"sites", "masks"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``mask/keep_rate/<site>`` and ``mask/z_score/<site>``."""
        records: dict[str, Record] = {}
        for site, seen in snapshot.statistics.items():
            if not seen.num_elements:
                continue
            records[f"mask/keep_rate/{site}"] = seen.keep_rate
            if seen.variance > 0:
                records[f"mask/z_score/{site}"] = seen.z_score
        return records
