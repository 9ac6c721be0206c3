"""Attaching to an existing training script.

Question: what does one line in my training script show, and what does it change?

    python tutorials/05_attach_to_training.py

Draws 05_attach_to_training.png, writes train_ddp.py; the cells run in a notebook too.
"""

# %% A training script as there are many: batch norm, two dropouts, mini-batches,
# AdamW, a schedule. Nothing in it knows of the analysis but the line that attaches it.
import json
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_dropout_ir as tdi

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
data = TensorDataset(images[:1000], torch.tensor(digits.target[:1000]))


def build():
    torch.manual_seed(0)
    body = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
    pool = nn.Dropout2d(0.1), nn.MaxPool2d(2), nn.Flatten()
    head = nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)
    return nn.Sequential(*body, *pool, *head)


def train(model, epochs=6, **options):
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    analysis = tdi.attach_analysis(model, **options) if options else None  # the line
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=100, shuffle=True):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(x), y).backward()
            optimizer.step()
        schedule.step()
    return analysis


# %% Once as it was, once with the line, which finds optimizer, loss, targets and sites.
# `log_dir=` makes a TensorBoard run; without `every=` it takes a twentieth of the time.
alone, watched = build(), build()
train(alone)
stream = torch.get_rng_state()
analysis = train(watched, log_dir=False, every=6)
print(analysis.summary())

# %% What it changed: not a bit, in parameters, buffers or the stream of random numbers.
torch.testing.assert_close(alone.state_dict(), watched.state_dict(), rtol=0, atol=0)
assert torch.equal(stream, torch.get_rng_state())

# %% What it saw is in `latest` and `history`: numbers by tag and step. R_1 comes by
# dropout site too, which tells where the work is done.
by_site = {t: v for t, v in analysis.latest.items() if t.startswith("regularizer/R1/")}

# %% Several processes: attach on every rank, after wrapping the model. This script runs
# here as one process, and as two that share the batch: they record what one does.
SCRIPT = """
import json, torch, torch.distributed as dist, torch_dropout_ir as tdi
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
x, y, rank, size = torch.randn(64, 8), torch.randint(3, (64,)), 0, 1
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with tdi.attach_analysis(model, log_dir=False, every=1) as analysis:
    nn.CrossEntropyLoss()(model(x[rank::size]), y[rank::size]).backward()
    optimizer.step()
if size == 2:
    print(json.dumps(dict(analysis.latest)) + "\\n", end="", flush=True)
    dist.destroy_process_group()
"""
Path("train_ddp.py").write_text(SCRIPT)
torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone"
command = *torchrun, "--nproc-per-node=2", "train_ddp.py"
ranks = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout
two = json.loads(ranks[ranks.index(b"{") :].splitlines()[0])  # gloo prints, too
one = runpy.run_path("train_ddp.py")["analysis"].latest
for tag in ("loss/R_S", "sharpness/trace", "regularizer/R1"):
    print(f"{tag:15} one process {one[tag]:.6f}, two {two[tag]:.6f}")

# %% The curves of the run, with the errors that were recorded beside them.
figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
losses = "loss/R_S", "regularizer/R1", "regularizer/R2"
surface = "sharpness/trace", "sharpness/top_eigenvalue"
ends = {"R1": "_standard_error", "trace": "_standard_error", "value": "_residual"}
for panel, tags in zip(panels, (losses, by_site, surface), strict=True):
    for tag in tags:
        beside = [tag.replace(of, of + end) for of, end in ends.items() if of in tag]
        error = [e for name in beside for _, e in analysis.history[name]] or None
        curve = zip(*analysis.history[tag], strict=True)
        panel.errorbar(*curve, error, capsize=2, label=tag)
    panel.set(xlabel="step", yscale="log")
    panel.legend(frameon=False)
panels[0].set_ylabel("units of the loss")
figure.savefig("05_attach_to_training.png", dpi=110)

# %% What was shown: one line, the same training, R_1 of both sites along it; and two
# ranks record what one does: R_S to rounding, R_1 to the error recorded with it.
assert len(by_site) == 2 and len(analysis.history["regularizer/R1"]) == 10
assert abs(one["loss/R_S"] - two["loss/R_S"]) < 1e-5
error = sum(r["regularizer/R1_standard_error"] ** 2 for r in (one, two)) ** 0.5
assert abs(one["regularizer/R1"] - two["regularizer/R1"]) < 4 * error
