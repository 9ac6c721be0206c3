"""The callbacks inside the real trainers, and steps that bring a closure."""

import contextlib
import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_dropout_ir as tdi
from torch_dropout_ir.inputs import Inputs


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


def data():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=draw)
    return TensorDataset(x, torch.randint(3, (48,), generator=draw))


@contextlib.contextmanager
def their_warnings():
    """Other people's warnings are not ours to fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same_training(train):
    """Train with and without; return the analysis."""
    ends = []
    for attached in (False, True):
        torch.manual_seed(7)
        model, analysis = train(attached)
        ends.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return analysis


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_step_with_a_closure_is_measured_after_its_passes(kind, keyword):
    inputs, targets = data().tensors
    found = []

    def train(attached):
        model = mlp()
        optimizer = kind(model.parameters(), lr=0.1)
        criterion = nn.CrossEntropyLoss()

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            if attached and len(found) == analysis.step:  # the first of the step
                squared = sum(p.grad.square().sum() for p in model.parameters())
                found.append(0.1 / 4 * float(squared))
            return loss

        with contextlib.ExitStack() as stack:
            analysis = attached and stack.enter_context(
                tdi.attach_analysis(model, log_dir=False, every=1)
            )
            for _ in range(3):
                optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        return model, analysis

    analysis = same_training(train)
    values = [value for _, value in analysis.history["regularizer/R2"]]
    assert values == pytest.approx(found, rel=1e-5) and len(values) == 3
    assert not analysis.absent


@pytest.fixture
def lightning(monkeypatch):
    with their_warnings():
        package = pytest.importorskip("lightning.pytorch", reason="no Lightning")
    monkeypatch.setenv("PL_DISABLE_TIPS", "1")
    return package


@pytest.mark.parametrize("calls", ["self(x)", "self.net(x)", "no forward"])
def test_lightning(lightning, tmp_path, calls):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    logged = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        if calls != "no forward":

            def forward(self, x):
                outputs = self.net(x)
                norm = outputs.detach().norm()
                self.log("norm", norm, on_step=False, on_epoch=True)
                return outputs

        def training_step(self, batch, _):
            outputs = self(batch[0]) if calls == "self(x)" else self.net(batch[0])
            return F.cross_entropy(outputs, batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(attached, epochs=2, resume=None):
        module = Module()
        callback = DropoutAnalysis(
            "cross_entropy", module="net" if calls == "self.net(x)" else "", every=1
        )
        with their_warnings():
            trainer = lightning.Trainer(
                max_epochs=epochs, accelerator="cpu", logger=False, devices=1,
                default_root_dir=tmp_path / str(attached), enable_model_summary=False,
                enable_progress_bar=False, callbacks=[callback] if attached else [],
                gradient_clip_val=0.1,
            )  # fmt: skip
            trainer.fit(module, DataLoader(data(), batch_size=16), ckpt_path=resume)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        logged.append(trainer.callback_metrics.get("norm"))
        return module, callback.analysis

    analysis = same_training(fit)
    assert analysis.step == 6 and not analysis.absent
    assert logged[0] == logged[1] and (logged[0] is None) is (calls != "self(x)")
    site = "net.2" if calls == "self(x)" else "2"
    assert analysis.latest[f"mask/keep_rate/{site}"] > 0
    # Clipped to a norm of 0.1, as the optimizer receives it.
    assert analysis.latest["regularizer/R2"] == pytest.approx(0.1 / 4 * 0.01, rel=1e-3)
    assert list((tmp_path / "True").glob("events*"))
    _, more = fit(True, epochs=3, resume=tmp_path / "last.ckpt")
    assert [step for step, _ in more.history["sharpness/trace"]] == list(range(9))


@pytest.fixture
def lightning_module(lightning):
    """A class of modules that classify."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module


def test_a_lightning_module_that_calls_its_parts_is_told_how_to_name_one(
    lightning, lightning_module
):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    class Parts(lightning_module):
        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    callback = DropoutAnalysis(every=1, log_dir=False)
    with their_warnings():
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, devices=1,
            enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(Parts(), DataLoader(data(), batch_size=16))
    assert "DropoutAnalysis(module=" in callback.analysis.absent["regularizer"]


def test_lightning_is_watched_where_one_child_alone_is_trained(lightning):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    class Parts(lightning.LightningModule):
        def __init__(self, *parts):
            super().__init__()
            self.parts = parts
            for place, part in enumerate(parts):
                self.add_module(f"part{place}", part)

    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    for parts, watched in (((first, nn.ReLU()), first), ((first, second), None)):
        module = Parts(*parts)
        trainer = types.SimpleNamespace(model=module)
        assert DropoutAnalysis()._model(trainer, module) is (watched or module)


def test_lightnings_targets_are_those_of_the_batch_that_was_passed(lightning):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    callback, x, y = DropoutAnalysis(), torch.ones(2), torch.zeros(2)
    callback.on_train_batch_start(None, None, (x, y), 0)
    assert callback._targets(Inputs((x,), {})) is y
    assert callback._targets(Inputs((x.clone(),), {})) is None


def test_lightning_begins_anew_with_another_fit(lightning, lightning_module):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    callback = DropoutAnalysis(log_dir=False, every=1)
    for fits in ((1,), (1, 2)):  # a model of its own each; the second goes on once
        module, loader = lightning_module(), DataLoader(data(), batch_size=16)
        with their_warnings():
            trainer = lightning.Trainer(
                accelerator="cpu", logger=False, enable_progress_bar=False, devices=1,
                enable_model_summary=False, callbacks=[callback], max_epochs=1,
                enable_checkpointing=False,
            )  # fmt: skip
            for epochs in fits:
                trainer.fit_loop.max_epochs = epochs
                trainer.fit(module, loader)
        steps = [step for step, _ in callback.analysis.history["loss/R_S"]]
        assert steps == list(range(3 * len(fits)))


def test_a_pass_inside_a_call_that_lightning_redirects_is_seen(lightning_module):
    """As its strategies for several processes call ``training_step``."""
    from lightning.pytorch.strategies.strategy import _ForwardRedirection

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args):
            return self.module(*args)

    found, batch = [], data()[:16]
    for redirected in (False, True):
        module = lightning_module()
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        with tdi.attach_analysis(module, log_dir=False, every=1) as analysis:
            for step in range(2):
                named = Wrapper(module), module, "training_step"
                call = _ForwardRedirection() if redirected else module.training_step
                torch.manual_seed(step)
                sgd.zero_grad()
                call(*(named if redirected else ()), batch, step).backward()
                sgd.step()
        assert not analysis.absent
        found.append(analysis.history)
    for tag in ("loss/R_S", "regularizer/R1", "sharpness/trace"):
        assert found[0][tag] == found[1][tag]


def test_lightning_detaches_after_an_exception(lightning, tmp_path):
    from torch_dropout_ir.integrations.lightning import DropoutAnalysis

    class Fails(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, number):
            self(batch[0])
            raise ZeroDivisionError

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Fails()
    with their_warnings(), pytest.raises(ZeroDivisionError):
        lightning.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, devices=1,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[DropoutAnalysis(log_dir=False, every=1)], max_epochs=1,
        ).fit(module, DataLoader(data(), batch_size=16))  # fmt: skip
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.fixture
def transformers():
    with their_warnings():
        package = pytest.importorskip("transformers", reason="no transformers")
        pytest.importorskip("accelerate", reason="no accelerate: Trainer needs it")
        yield package


def test_hugging_face_trainer(transformers, tmp_path):
    from torch_dropout_ir.integrations.transformers import DropoutAnalysis

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(20, (7,), generator=draw), "labels": i % 3}
        for i in range(24)
    ]

    def train(attached, steps=3, resume=False):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(copy.deepcopy(config))
        callback = DropoutAnalysis(every=1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(attached)), max_steps=steps, use_cpu=True,
            per_device_train_batch_size=8, report_to="none", save_steps=3,
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, callbacks=[callback] * attached
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, callback.analysis

    analysis = same_training(train)
    assert analysis.step == 3
    assert {
        "regularizer/R1", "loss/R_S", "regularizer/R2_dropout_noise", "sharpness/trace",
        "mask/keep_rate/dropout",
    } <= set(analysis.latest)  # fmt: skip
    assert list((tmp_path / "True" / "dropout_ir").glob("events*"))
    _, more = train(True, steps=5, resume=True)
    assert [s for s, _ in more.history["regularizer/R1"]] == [0, 1, 2, 3, 4]


def test_an_accumulated_pass_is_measured_over_its_share_of_the_items(
    transformers, tmp_path
):
    from torch_dropout_ir.analysis.measures import Regularizer
    from torch_dropout_ir.integrations.transformers import DropoutAnalysis

    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    callback = DropoutAnalysis(
        every=1, log_dir=False, measures=[Regularizer(num_masks=2)]
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config), arguments, train_dataset=[row] * 8,
        callbacks=[callback],
    )  # fmt: skip
    trained_on = trainer.train().training_loss
    analysis = callback.analysis
    assert analysis.latest["loss/R_S"] == pytest.approx(trained_on, rel=1e-5)
    assert "the last of 4 passes" in analysis.notes["loss/R_S"]


def test_the_loss_of_a_trainer_that_smooths_labels_is_followed(transformers, tmp_path):
    from torch_dropout_ir.analysis.measures import Regularizer
    from torch_dropout_ir.integrations.transformers import DropoutAnalysis

    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    measures = [Regularizer(num_masks=2)]
    callback = DropoutAnalysis(every=1, log_dir=False, measures=measures)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", label_smoothing_factor=0.3,
    )  # fmt: skip
    trainer = transformers.Trainer(
        transformers.GPT2LMHeadModel(config), arguments, train_dataset=[row] * 8,
        callbacks=[callback],
    )  # fmt: skip
    trained_on = trainer.train().training_loss
    assert callback.analysis.latest["loss/R_S"] == pytest.approx(trained_on, rel=1e-5)


def test_a_loss_that_the_trainer_computes_is_to_be_given(transformers):
    from torch_dropout_ir.integrations.transformers import models_own_loss

    outputs = transformers.modeling_outputs.SequenceClassifierOutput
    loss = torch.ones(())
    assert models_own_loss(outputs(loss=loss, logits=torch.ones(2)), None) is loss
    with pytest.raises(ValueError, match="compute_loss_func"):
        models_own_loss(outputs(logits=torch.ones(2)), None)
