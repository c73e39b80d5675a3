import json

import pytest

from taylor_cuda.cli.main import main

FROZEN = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.sort(x.mean((2, 3)), dim=1).values)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 2)

    def forward(self, x):
        return self.only(x)
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FROZEN, encoding="utf-8")
    return path


def doctor(capsys, *arguments):
    code = main(["doctor", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_digits_as_json(capsys):
    code, out, _ = doctor(capsys, "digits", "--json", "--ignore", "stage1.*.conv1")
    found = json.loads(out)
    assert code == 0
    assert found["input"] == [1, 8, 8]
    # 64 or 16 positions, 3×3 kernels: stem, stage 1, stage 2 with its shortcut, head.
    macs = 64 * 9 * (32 + 4 * 32 * 32) + 16 * (9 * (32 * 64 + 3 * 64 * 64) + 32 * 64) + 640
    assert found["cost"]["macs"] == macs
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["stem.0"]["size"] == 32
    assert not any(name.startswith("stage1") for name in groups)
    inner = 16 * 9 * 2 * 64 * 64 / macs
    assert groups["stage2.1.conv1"]["macs_share"] == pytest.approx(inner)
    assert sorted(groups["stage2.1.conv1"]["layers"]) == ["stage2.1.conv1", "stage2.1.conv2"]
    frozen = {frozen["name"] for frozen in found["frozen"]}
    assert {"head", "stage1.0.conv1", "stage1.1.conv1"} <= frozen
    assert 0 < found["best_case"]["macs"] < 0.5 * macs


def test_best_case_follows_the_floor(capsys):
    costs = [json.loads(doctor(capsys, "digits", "--json", "--min-keep", n)[1])["best_case"] for n in (1, 8, 1000)]
    assert costs[0]["macs"] < costs[1]["macs"] < costs[2]["macs"]
    assert costs[0]["channels"] == 6
    assert costs[2] == json.loads(doctor(capsys, "digits", "--json")[1])["cost"]


def test_table_names_what_stays_and_why(capsys, nets):
    code, out, _ = doctor(capsys, f"{nets}:Net", "--input", "3,16,16")
    assert code == 0
    assert "3×16×16" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["first"].split()[1:3] == ["8", "2"]
    assert "sort" in rows["second"]
    assert "best" in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet",), "model: wanted 'digits', 'timm:NAME'"),
        (("digits", "--input", "3,x"), "input: wanted whole numbers above 0 like 3,224,224, got '3,x'"),
        (("digits", "--input", "0,8,8"), "input: wanted whole numbers above 0"),
        (("digits", "--min-keep", "0"), "min_keep: wanted a number of at least 1"),
        (("digits", "--ignore", "nothing.*"), "nothing.*"),
    ],
)
def test_bad_input(capsys, arguments, message):
    code, out, err = doctor(capsys, *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_wrong_input_shape_and_nothing_to_prune(capsys, nets):
    code, _, err = doctor(capsys, "digits", "--input", "3,8,8")
    assert code == 2
    assert "Traceback" not in err
    code, _, err = doctor(capsys, f"{nets}:Fixed", "--input", "4")
    assert code == 2
    assert "nothing to prune" in err
    assert "an output of the network" in err
