"""Statistics of the masks of a training run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torch_dropout_ir.analysis.records import Record
from torch_dropout_ir.analysis.snapshot import Need, Snapshot
from torch_dropout_ir.masks import MaskStatistics


class Masks:
    r"""Keep rates and z-scores of the masks seen so far, by site.

    Of ``n`` elements ``k`` were kept, each with probability ``q = 1 - p``: the rate is
    ``k / n``, and

    .. math:: z = (k - n q) / \sqrt{n q (1 - q)}

    in standard deviations of the binomial law; beyond 5 the masks are not what they
    claim. No pass of the model is made.
    """

    name = "masks"
    needs: frozenset[Need] = frozenset({"sites", "masks"})

    def __call__(self, snapshot: Snapshot) -> Mapping[str, Record]:
        """Return ``mask/keep_rate/<site>`` and ``mask/z_score/<site>``."""
        records: dict[str, Record] = {}
        for site, seen in _merged(snapshot).items():
            if not seen.num_elements:
                continue
            records[f"mask/keep_rate/{site}"] = seen.keep_rate
            if seen.variance > 0:
                records[f"mask/z_score/{site}"] = seen.z_score
        return records


def _merged(snapshot: Snapshot) -> dict[str, MaskStatistics]:
    """Statistics of all ranks, without the counts of units."""
    if snapshot.ranks.size == 1:
        return snapshot.statistics
    kept = ("num_elements", "num_kept", "expected_kept", "variance")
    total = snapshot.ranks.sum({
        f"{name} {site}": float(getattr(seen, name))
        for site, seen in snapshot.statistics.items()
        for name in kept
    })
    sites = {key.partition(" ")[2] for key in total}
    return {
        site: MaskStatistics(
            num_elements=int(total[f"num_elements {site}"]),
            num_kept=torch.tensor(int(total[f"num_kept {site}"]), device="cpu"),
            expected_kept=total[f"expected_kept {site}"],
            variance=total[f"variance {site}"],
        )
        for site in sorted(sites)
    }
