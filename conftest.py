"""Names that the docstrings' examples use."""

import pytest
import torch
from torch import nn

import torch_dropout_ir as tdi

# They import packages that need not be there.
collect_ignore_glob = ["torch_dropout_ir/integrations/*"]


@pytest.fixture(autouse=True)
def _examples(doctest_namespace):
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=nn, tdi=tdi)
    for subject in (tdi.regularizers, tdi.testing):
        doctest_namespace.update(vars(subject))
