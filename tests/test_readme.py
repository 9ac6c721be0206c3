"""The README's code runs as it stands."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    names["analysis"].detach()
    assert names["report"].agreeing
    printed = capsys.readouterr().out
    assert "regularizer/R1" in printed and "sharpness/trace" in printed
    assert not names["analysis"].absent
    assert abs(names["layer"].statistics.z_score) < 5


def test_every_tag_of_the_table_has_a_description():
    from torch_dropout_ir.tensorboard.descriptions import describe_tag

    table = TEXT.split("## What is measured")[1].split("`p` is the")[0]
    stems = "regularizer|loss|mask|condensation|sharpness|cost"
    tags = re.findall(rf"`((?:{stems})/[^`]+)`", table)
    assert len(tags) > 12
    for tag in tags:
        assert describe_tag(tag, {}), tag
