"""The four networks of Fig. 12: their shapes, the pairs of sentences, the masks."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

FOLDER = Path(__file__).parents[1] / "tutorials" / "paper"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def root(tmp_path):
    """Pairs of sentences whose words can be counted by hand."""
    folder = tmp_path / "multi30k"
    folder.mkdir()
    for name, lines in {
        "train.de": ["Ein Mann, ein Hund.", "Ein Mann.", "Der Hund läuft.", "Nein"],
        "train.en": ["A man, a dog.", "A man.", "The dog runs.", "Nothing to see"],
        "test_2016_flickr.de": ["Ein Hund.", "Eine Katze schläft"],
        "test_2016_flickr.en": ["A dog.", "A cat"],
    }.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_sentences_become_the_numbers_counted_by_hand(script, root):
    translation = script("translation")
    (x, y), (test_x, test_y), sizes = translation.multi30k(root, 3)
    # Three times ein or a and the full stop, twice Mann and Hund, the rest once.
    ein, stop, mann, hund = range(4, 8)
    assert sizes == (8, 8)
    assert x.shape == (3, 2, 7)
    assert x[0, 0].tolist() == [ein, mann, 3, ein, hund, stop, 0]
    assert x[0, 1].tolist() == [1, ein, mann, 3, ein, hund, stop]
    assert x[1].tolist() == [[ein, mann, stop, *[0] * 4], [1, ein, mann, stop, 0, 0, 0]]
    assert x[2].tolist() == [[3, hund, 3, stop, 0, 0, 0], [1, 3, hund, 3, stop, 0, 0]]
    assert y[0].tolist() == [ein, mann, 3, ein, hund, stop, 2]
    assert y[1].tolist() == [ein, mann, stop, 2, *[-100] * 3]
    assert test_x.tolist()[1] == [[3, 3, 3, 0], [1, ein, 3, 0]]
    assert test_y.tolist() == [[ein, hund, stop, 2], [ein, 3, 2, -100]]
    short, targets = translation.trim(x[1:], y[1:])
    assert short.equal(x[1:, :, :5])
    assert targets.equal(y[1:, :5])
    with pytest.raises(SystemExit, match=r"--data-root: .*train\.de"):
        translation.multi30k(root / "nowhere", 3)


def test_images_that_are_nowhere_to_be_had_are_said(script, tmp_path, monkeypatch):
    def nowhere(root, train, download):
        raise RuntimeError(f"Error downloading train={train}:\nno network\n")

    monkeypatch.setattr("torchvision.datasets.MNIST", nowhere)
    said = rf"^--data-root: found no .* under {tmp_path}\. Error .*: no network$"
    with pytest.raises(SystemExit, match=said):
        script("data").mnist(tmp_path)


def test_batches_are_random_pairs_of_like_lengths(script):
    translation = script("translation")
    torch.manual_seed(0)
    lengths = torch.randint(1, 30, (400,))
    x = torch.where(torch.arange(30) < lengths[:, None], 5, translation.PAD)
    x = torch.stack([x, x], 1)
    drawn = torch.stack([translation.of_one_length(x, 8) for _ in range(300)])
    longest, mean = lengths[drawn].amax(1), lengths[drawn].float().mean(1)
    assert float((longest - mean).mean()) < 4  # of eight random ones: more than 10
    assert len(drawn.unique()) > 390
    assert float(mean.mean()) == pytest.approx(float(lengths.float().mean()), rel=0.05)


def copied(ours, torchs, attentions):
    """The numbers of one of our layers in one of torch's."""
    with torch.no_grad():
        for mine, theirs in zip(ours.attentions, attentions, strict=True):
            parts = mine.q, mine.k, mine.v
            theirs.in_proj_weight.copy_(torch.cat([one.weight for one in parts]))
            theirs.in_proj_bias.copy_(torch.cat([one.bias for one in parts]))
            theirs.out_proj.load_state_dict(mine.out.state_dict())
    torchs.linear1.load_state_dict(ours.linear[0].state_dict())
    torchs.linear2.load_state_dict(ours.linear[2].state_dict())
    for k, norm in enumerate(ours.norms):
        getattr(torchs, f"norm{k + 1}").load_state_dict(norm.state_dict())
    return torchs


def test_the_transformer_is_torchs_where_torch_has_it(script):
    """Torch's layers have d_k = d_v = d_model / heads alone."""
    translation = script("translation")
    torch.manual_seed(1)
    net = translation.Transformer((9, 11), (6, 2, 3, 3, 16, 2), 0.4).double().eval()
    for one in net.parameters():
        nn.init.normal_(one, std=0.5)
    x = torch.randint(3, 9, (4, 2, 7))
    for row, (german, english) in enumerate([(7, 5), (2, 7), (1, 1), (5, 3)]):
        x[row, 0, german:], x[row, 1, english:] = translation.PAD, translation.PAD
    kind = {"dim_feedforward": 16, "batch_first": True, "dtype": torch.float64}
    padded = x[:, 0] == translation.PAD
    later = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    place = torch.tensor(
        [[np.sin(k / 1e4 ** (j / 6)) if j % 2 == 0 else np.cos(k / 1e4 ** ((j - 1) / 6))
          for j in range(6)] for k in range(7)]
    )  # fmt: skip
    source, target = (
        embedding.weight[one] * 6**0.5 + place
        for embedding, one in zip(net.embeddings, x.unbind(1), strict=True)
    )
    for layer in net.encoder:
        other = nn.TransformerEncoderLayer(6, 2, **kind).eval()
        copied(layer, other, [other.self_attn])
        source = other(source, src_key_padding_mask=padded)
    for layer in net.decoder:
        other = nn.TransformerDecoderLayer(6, 2, **kind).eval()
        copied(layer, other, [other.self_attn, other.multihead_attn])
        target = other(target, source, later, memory_key_padding_mask=padded)
    expected = (target @ net.head.weight.T + net.head.bias).mT
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


def test_heads_of_their_own_sizes(script):
    translation = script("translation")
    one = translation.Attention(6, 3, 5, 4).double()
    x, seen = (torch.randn(2, t, 6, dtype=torch.float64) for t in (3, 4))
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    q, k, v = one.q(x), one.k(seen), one.v(seen)
    rows = torch.zeros(2, 3, 12, dtype=torch.float64)
    for n in range(2):
        kept = mask[n, 0, 0].nonzero().flatten()
        for h in range(3):
            key, value = k[n, kept, 5 * h : 5 * h + 5], v[n, kept, 4 * h : 4 * h + 4]
            for t in range(3):
                scores = (key @ q[n, t, 5 * h : 5 * h + 5] / 5**0.5).exp()
                rows[n, t, 4 * h : 4 * h + 4] = scores @ value / scores.sum()
    torch.testing.assert_close(one(x, seen, mask), one.out(rows))


def test_dropout_of_the_transformer_is_in_every_part(script):
    translation = script("translation")
    net = translation.Transformer((9, 11), (6, 2, 5, 4, 16, 2), 0.4)
    assert len([m for m in net.modules() if isinstance(m, nn.Dropout)]) == 5
    calls = []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    net(torch.randint(3, 9, (2, 2, 4)))
    assert len(calls) == 2 + 2 * 2 + 3 * 2  # words; two parts; three parts


def test_the_learning_rate_rises_and_falls(script):
    warmed = script("translation").warmed
    rates = [warmed(step, 50, 4000) for step in range(20000)]
    assert max(range(20000), key=rates.__getitem__) == 3999
    assert rates[3999] == pytest.approx((50 * 4000) ** -0.5)
    assert rates[999] == pytest.approx(rates[3999] / 4)
    assert rates[15999] == pytest.approx(rates[3999] / 2)


def test_vgg9_has_six_convolutions_and_three_linear_layers(script):
    net = script("four_networks").vgg9(2, 16, 0.2)
    kinds = [type(module).__name__ for module in net]
    assert kinds.count("Conv2d") == 6
    assert kinds.count("Linear") == 3
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_the_residual_network_has_twenty_layers_and_adds(script):
    four_networks = script("four_networks")
    net = four_networks.resnet20(16, 100, 0.2)
    sides = []
    blocks = [one for one in net if isinstance(one, four_networks.Block)]
    for one in blocks:
        one.register_forward_hook(lambda m, a, y: sides.append(tuple(y.shape[1:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert sides == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    deep = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(getattr(m, "kernel_size", None) != (1, 1) for m in deep) == 20
    # 0.27 million in He et al., and the two shortcuts and 90 more classes.
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(278e3, rel=0.01)
    assert all(one.last[-1].p == 0.2 for one in blocks)
    # Without its convolutions a block is the identity of what is positive.
    block = four_networks.Block(16, 16, 1, 0.2).eval()
    nn.init.zeros_(block.two[3].weight)
    x = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_accuracy_leaves_out_what_has_no_target(script):
    accuracy = script("data").accuracy
    y = torch.tensor([[0, 1, -100], [2, 2, 0], [1, -100, -100]])
    logits = nn.functional.one_hot(torch.zeros(3, 3, dtype=torch.long), 3).float().mT

    class Zero(nn.Module):
        def forward(self, x):
            return logits[: len(x)]

    assert accuracy(Zero(), y, y, batch=3) == pytest.approx(100 * 2 / 6)
    labels = torch.tensor([0, 1, 0, 0])
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(net, torch.randn(4, 4), labels, batch=3) == 75


def test_fig_12_reduced_and_resumed(script, root, tmp_path, capsys):
    """Of the four networks the one whose data can be written by hand."""
    arguments = ["--quick", "--networks", "transformer", "--data-root", str(root)]
    script("fig12_flatness").main([*arguments, "--out", str(tmp_path)])
    first = capsys.readouterr().out
    record = json.loads((tmp_path / "fig12-quick" / "fig12.json").read_text())
    assert len(record["claims"]) == 2
    for kind in ("without", "dropout"):
        (numbers,) = record["numbers"][f"transformer-{kind}"]
        assert 0 <= numbers["accuracy"] <= 100
        assert numbers["R_S"] < 0.8 * np.log(8)  # of guessing one of eight words
        assert numbers["train_accuracy"] > 50
    picture = Image.open(tmp_path / "fig12-quick" / "fig12.png").convert("RGB")
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100
    runs = tmp_path / "fig12-quick" / "tensorboard"
    assert list(runs.glob("transformer-dropout-seed0/*tfevents*"))
    script("fig12_flatness").main([*arguments, "--out", str(tmp_path)])
    assert capsys.readouterr().out == first  # nothing was trained again
