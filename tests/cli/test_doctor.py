import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import taylor_cuda as tc
from taylor_cuda.cli.main import main
from taylor_cuda.report.doctor import doctor_text
from taylor_cuda.report.examine import examine, split_reason
from tests.graph.attention_nets import CountedHeads, OpenHeads
from tests.graph.base import Net, conv, image
from tests.graph.nets import ConvBN, Grouped, GroupNormed
from tests.graph.odd_nets import Parametrized, Shared, TrainHead

NETS = """
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
        return self.head(torch.sort(x.mean((2, 3)), dim=1).values)  # the line of the reason


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 2)

    def forward(self, x):
        return self.only(x)


class Chatty(Net):
    def forward(self, x):
        print("hello from the forward pass")
        return super().forward(x)


class Raising(Net):
    def forward(self, x):
        raise ValueError("first line\\nsecond line")


def half_meta():
    model = Net()
    model.head.to("meta")
    return model


def compiled():
    return torch.compile(Net(), backend="eager")


def wrapped():
    return nn.DataParallel(Net())
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS, encoding="utf-8")
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
    assert groups["stage2.1.conv1"]["macs"] == 16 * 9 * 2 * 64 * 64
    assert groups["stage2.1.conv1"]["params"] == 9 * 2 * 64 * 64 + 2 * 64
    frozen = {frozen["name"] for frozen in found["frozen"]}
    assert {"head", "stage1.0.conv1", "stage1.1.conv1"} <= frozen
    assert 0 < found["best_case"]["macs"] < 0.5 * macs


def test_json_holds_what_its_description_promises(capsys, nets):
    found = json.loads(doctor(capsys, f"{nets}:Net", "--input", "3,16,16", "--json")[1])
    assert list(found) == [
        *("model", "input", "seconds"),
        *("cost", "groups", "frozen", "best_case", "traps", "notes"),
    ]
    assert found["cost"].keys() == {"macs", "params", "channels"}
    assert list(found["groups"][0]) == [
        *("name", "size", "unit", "width", "writers", "readers", "norms", "others", "members"),
        *("macs", "macs_share", "params", "params_share", "lowest", "numbers"),
    ]
    assert found["groups"][0]["members"] == [
        {"tensor": "first.weight", "dim": 0, "role": "write", "width": 1},
        {"tensor": "first.bias", "dim": 0, "role": "other", "width": 1},
        {"tensor": "second.weight", "dim": 1, "role": "read", "width": 1},
    ]
    floors = {"min_keep": 1, "max_ratio": 1.0, "round_to": 1}
    assert found["groups"][0]["others"] == []  # a writer's bias is no other layer
    assert found["best_case"].keys() == {"macs", "params", "channels", "budget", *floors}
    assert floors.items() <= found["best_case"].items()
    assert found["traps"].keys() == {"frozen_parameters", "shared", "odd_groups", "unused", "train_only"}
    line = next(at for at, text in enumerate(NETS.splitlines(), 1) if "the line of the reason" in text)
    assert {entry["name"]: entry for entry in found["frozen"]} == {
        "second": {
            "name": "second",
            "size": 12,
            "reason": "sort over channels",
            "module": "",
            "line": f"nets.py:{line}",
        },
        "head": {"name": "head", "size": 5, "reason": "an output of the network", "module": "", "line": ""},
    }


def place(module, line):
    return {"module": module, "line": line}


def test_layers_of_a_group_by_what_they_do_to_it():
    found = {group["name"]: group for group in facts(ConvBN(), image())["groups"]}["a"]
    layers = {key: found[key] for key in ("writers", "norms", "readers", "others")}
    assert layers == {"writers": ["a"], "norms": ["bn"], "readers": ["b"], "others": []}
    assert (found["size"], found["unit"], found["width"]) == (8, "channel", 1)
    # an 8×8 image, halved before the second convolution
    assert found["macs"] == 8 * 9 * (3 * 64 + 4 * 16)
    assert found["params"] == 8 * (9 * 3 + 2 + 9 * 4)


# -- what a budget can reach ----------------------------------------------------------------------------------------


def facts(model, inputs, **floors):
    return examine(model, tc.trace(model, inputs), **floors)


def tokens():
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


CASES = [
    (ConvBN, image, {}),
    (ConvBN, image, {"min_keep": 3}),
    (ConvBN, image, {"max_ratio": 0.3}),
    (ConvBN, image, {"round_to": 4}),
    (Grouped, image, {}),
    (CountedHeads, tokens, {}),
]
IDS = ["plain", "min_keep", "max_ratio", "round_to", "groups", "heads"]


@pytest.mark.parametrize(("make", "inputs", "floors"), CASES, ids=IDS)
def test_best_case_is_what_a_cut_to_the_floors_costs(make, inputs, floors):
    model = make().eval()
    groups = tc.trace(model, inputs())
    found = examine(model, groups, **floors)
    keep = {group["name"]: torch.arange(group["lowest"]) for group in found["groups"]}
    tc.cut(model, groups, keep)
    best = found["best_case"]
    assert best["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert best["channels"] == sum(group.size for group in groups)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(inputs())
    assert best["macs"] == counter.get_total_flops() // 2 // 2  # two examples, two operations each


@pytest.mark.parametrize("cost", ["macs", "params", "channels"])
@pytest.mark.parametrize(("make", "inputs", "floors"), CASES, ids=IDS)
def test_the_lowest_budget_can_be_planned_and_no_lower_one(make, inputs, floors, cost):
    model = make()
    groups = tc.trace(model, inputs())
    lowest = examine(model, groups, **floors)["best_case"]["budget"][cost]
    scores = {group.name: torch.rand(group.size) for group in groups}
    reached = tc.plan(model, groups, scores, {cost: lowest}, **floors)
    assert getattr(reached.cost, cost) <= lowest * getattr(reached.cost_original, cost) + 1
    with pytest.raises(tc.BudgetError):
        tc.plan(model, groups, scores, {cost: lowest - 1e-4}, **floors)


def test_best_case_follows_the_floors_given(capsys):
    costs = [json.loads(doctor(capsys, "digits", "--json", "--min-keep", n)[1])["best_case"] for n in (1, 8, 1000)]
    assert costs[0]["macs"] < costs[1]["macs"] < costs[2]["macs"]
    assert costs[0]["channels"] == 6
    whole = json.loads(doctor(capsys, "digits", "--json", "--max-ratio", "0")[1])
    assert {name: costs[2][name] for name in whole["cost"]} == whole["cost"]
    assert whole["best_case"]["budget"] == {"macs": 1.0, "params": 1.0, "channels": 1.0}
    rounded = json.loads(doctor(capsys, "digits", "--json", "--round-to", "16")[1])
    assert {group["lowest"] for group in rounded["groups"]} == {16}


# -- traps ----------------------------------------------------------------------------------------------------------


class ScaledHeads(Net):
    """Heads that meet in no product: each is multiplied with a number of its own."""

    def __init__(self):
        super().__init__(a=nn.Linear(6, 12), b=nn.Linear(12, 2))
        self.num_heads, self.scale = 4, nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return self.b((self.a(x).view(*x.shape[:2], self.num_heads, 3) * self.scale).flatten(2))


@pytest.mark.parametrize(
    ("make", "inputs", "expected"),
    [
        (ScaledHeads, tokens, ("head", 3)),
        (Grouped, image, ("convolution group", 3)),
        (GroupNormed, image, ("norm group", 3)),
        (OpenHeads, tokens, ("head", 12)),
    ],
)
def test_units_of_several_channels_are_odd_groups(make, inputs, expected):
    found = facts(make(), inputs())
    odd = [group for group in found["groups"] if group["name"] in found["traps"]["odd_groups"]]
    assert expected in {(group["unit"], group["width"]) for group in odd}
    assert all(group["unit"] == "channel" for group in found["groups"] if group not in odd)
    assert all(group["width"] == 1 for group in found["groups"] if group not in odd)


def test_attributes_that_follow_a_cut():
    model = CountedHeads()
    groups = tc.trace(model, tokens())
    (heads,) = (group for group in examine(model, groups)["groups"] if group["numbers"])
    numbers = {entry["name"]: (entry["value"], entry["per_unit"]) for entry in heads["numbers"]}
    assert numbers == {"num_heads": (3, 1), "attn_dim": (15, 5)}
    tc.cut(model, groups, {heads["name"]: torch.tensor([0, 2])})
    (heads,) = (group for group in examine(model, groups)["groups"] if group["numbers"])
    numbers = {entry["name"]: entry["value"] for entry in heads["numbers"]}
    assert numbers == {"num_heads": model.num_heads, "attn_dim": model.attn_dim} == {"num_heads": 2, "attn_dim": 10}


def test_parameters_that_are_not_trained():
    model = ConvBN()
    model.bn.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)  # of an output of the network, which is in no group
    traps = facts(model, image())["traps"]
    assert traps["frozen_parameters"] == [{"parameter": "bn.weight", "groups": ["a"]}]


class Drawing(ConvBN):
    """Draws from torch's generator, and counts its calls in a buffer and in its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        x += torch.rand(1)
        return super().forward(x)


def test_a_model_is_left_as_it_was():
    model = Drawing()
    groups = tc.trace(model, image())
    state, tensors = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    examine(model, groups)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert torch.equal(groups.example_inputs[0][0], image())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


class TiedWords(Net):
    """One table as embedding and as head."""

    def __init__(self):
        super().__init__(table=nn.Embedding(9, 6), up=nn.Linear(6, 8), down=nn.Linear(8, 6), head=nn.Linear(6, 9))
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(self.down(F.relu(self.up(self.table(index)))))


def test_shared_parameters_and_modules():
    called = facts(Shared(), image())["traps"]["shared"]
    assert called == [
        {"parameter": "s.weight", "names": ["s.weight"], "calls": 2},
        {"parameter": "s.bias", "names": ["s.bias"], "calls": 2},
    ]
    tied = facts(TiedWords(), torch.randint(0, 9, (2, 4)))["traps"]["shared"]
    assert tied == [{"parameter": "table.weight", "names": ["table.weight", "head.weight"], "calls": 1}]
    assert facts(ConvBN(), image())["traps"]["shared"] == []


class Leftovers(Net):
    """A block, half a block and a parameter that nothing uses; others that are used in ways that are easy to miss."""

    def __init__(self):
        block = nn.Sequential(conv(3, 4), nn.Sequential(nn.BatchNorm2d(4)))
        super().__init__(
            a=conv(3, 4), b=conv(4, 8), block=block, part=nn.Linear(8, 8), rnn=nn.LSTM(8, 5), fc=nn.Linear(5, 2)
        )
        self.alone = nn.Parameter(torch.zeros(7))
        self.table = nn.Parameter(torch.ones(8))
        self.nested = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.b(F.relu(self.a(x))).mean((2, 3)) * self.table.data + self.part.bias
        x = torch.stack([x, torch.cat([self.nested[None], self.nested[None]])])
        return self.fc(self.rnn(x)[0][-1])


def test_parameters_that_no_forward_pass_meets():
    unused = facts(Leftovers(), image())["traps"]["unused"]
    names = ["block.0.weight", "block.0.bias", "block.1.0.weight", "block.1.0.bias"]
    assert unused == [
        {"module": "block", "params": 4 * 27 + 4 + 8, "parameters": names},
        {"module": "alone", "params": 7, "parameters": ["alone"]},
        {"module": "part.weight", "params": 64, "parameters": ["part.weight"]},
    ]
    assert facts(Parametrized(), image())["traps"]["unused"] == []


def test_what_only_train_mode_meets():
    model = TrainHead()
    traps = facts(model, image())["traps"]
    assert traps["train_only"] == [{"module": "aux", "params": 27, "parameters": ["aux.weight", "aux.bias"]}]
    assert traps["unused"] == []
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- text -----------------------------------------------------------------------------------------------------------


def test_table_names_what_stays_and_why(capsys, nets, monkeypatch):
    monkeypatch.chdir(nets.parent)  # a long path would leave no room for the rest of the title
    code, out, _ = doctor(capsys, f"{nets.name}:Net", "--input", "3,16,16")
    assert code == 0
    assert "3×16×16" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["first"].split()[1:3] == ["8", "1"]
    assert "written by first\n    read by second" in out
    assert "sort over channels (nets.py:" in rows["second"]
    assert "macs=0." in rows["MACs"]


def test_text_tells_every_trap():
    model = TrainHead()
    model.a.weight.requires_grad_(False)
    groups = tc.trace(model, image())
    groups.notes.append("something to know")
    found = {"model": "m", "input": [3, 8, 8], "seconds": 0.1, **examine(model, groups)}
    for make, inputs, text in [
        (Shared, image, "used more than once in one forward pass: s (2 times)"),
        (TiedWords, lambda: torch.randint(0, 9, (2, 4)), "under several names, cut once for all of them: table.weight"),
        (Grouped, image, "3 at once (convolution group)"),
        (CountedHeads, tokens, "num_heads = 3 (1 a unit)"),
        (Leftovers, image, "alone (7 parameters)"),
    ]:
        other = make()
        assert text in unwrapped({**found, **facts(other, inputs())})
    text = unwrapped(found)
    assert "only the forward pass in train mode meets: aux (27 parameters)" in text
    assert "have no gradient to score with: a.weight" in text
    assert "note: something to know" in text


def unwrapped(found):
    return " ".join(doctor_text(found, 100, full=True).split())


@pytest.mark.parametrize("columns", [72, 80, 132])
def test_lines_fit_the_terminal_unless_all_is_asked_for(columns):
    found = facts(CountedHeads(), tokens())
    module = "a.very.long.path.to.a.module.of.some.network.that.goes.on.and.on"
    reason = "the code can't run with fewer channels: " + " ".join(f"word{at}" for at in range(40))
    found["frozen"].append({"name": module, "size": 4, "reason": reason, "module": "q", "line": "nets.py:7"})
    found["groups"][0].update(name=module, readers=[f"{module}.{at}" for at in range(9)])
    found.update(model="m", input=[3, 8, 8], seconds=0.1, notes=["note " * 100])
    lines = doctor_text(found, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert any(line.endswith("…") for line in lines)
    assert any(line.startswith("    read by") and line.endswith(" more") for line in lines)
    assert any("can't run" in line and line.endswith("… (q, nets.py:7)") for line in lines)
    full = unwrapped(found)
    assert f"{reason} (q, nets.py:7)" in full
    assert f"{module}.8" in full
    assert "…" not in full


def test_the_command_asks_the_terminal_for_its_width(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "74")
    out = doctor(capsys, "digits")[1]
    assert max(map(len, out.splitlines())) <= 74
    assert "and 1 more" in out
    full = doctor(capsys, "digits", "--full")[1]
    assert "stage2.0.shortcut.0" in full
    assert " more" not in full


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("softmax over channels (head, nets.py:12)", ("softmax over channels", "head", "nets.py:12")),
        ("softmax (nets.py:12)", ("softmax", "", "nets.py:12")),
        ("ignored (head)", ("ignored", "head", "")),
        ("shape (2, 16) is invalid", ("shape (2, 16) is invalid", "", "")),
        ("a view that fails (2, 16)", ("a view that fails (2, 16)", "", "")),
        ("an output of the network", ("an output of the network", "", "")),
        ("fails: shape (2, 16) (nets.py:3)", ("fails: shape (2, 16)", "", "nets.py:3")),
    ],
)
def test_the_place_is_told_from_the_reason(reason, expected):
    assert split_reason(reason, {"", "head"}) == expected


# -- sources, output and exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "spec", "group"),
    [
        ("timm", "timm:resnet10t", "conv1.0"),
        ("torchvision", "torchvision:squeezenet1_1", "features.0"),
        ("torch", "tests.graph.nets:ConvBN", "a"),
    ],
)
def test_models_of_every_source(capsys, library, spec, group):
    pytest.importorskip(library)
    code, out, _ = doctor(capsys, spec, "--input", "3,64,64", "--json")
    assert code == 0
    found = json.loads(out)
    assert group in [entry["name"] for entry in found["groups"]]
    assert 0 < found["best_case"]["budget"]["macs"] < 0.5


def test_stdout_holds_nothing_but_the_json(capsys, nets):
    code, out, err = doctor(capsys, f"{nets}:Chatty", "--input", "3,16,16", "--json")
    assert code == 0
    assert json.loads(out)["groups"]
    assert "hello from the forward pass" in err


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Raising", "example_inputs: the model's forward pass raises with them: ValueError: first line second line"),
        ("Fixed", "nothing to prune. Channels that stay: 2 (an output of the network)"),
        ("half_meta", "has tensors on the meta device"),
        ("compiled", "compiled by torch.compile; give the original module"),
        ("wrapped", "wrapped in DataParallel; give the module inside"),
        ("Missing", "has no model named 'Missing'"),
    ],
)
def test_what_cannot_be_traced_is_one_line_and_an_exit_code(capsys, nets, factory, message):
    code, out, err = doctor(capsys, f"{nets}:{factory}", "--input", "4" if factory == "Fixed" else "3,16,16")
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet",), "model: wanted 'digits', 'timm:NAME'"),
        (("digits", "--input", "3,x"), "input: wanted whole numbers above 0 like 3,224,224, got '3,x'"),
        (("digits", "--input", "0,8,8"), "input: wanted whole numbers above 0"),
        (("digits", "--min-keep", "0"), "min_keep: wanted a whole number of at least 1"),
        (("digits", "--max-ratio", "2"), "max_ratio: wanted a fraction from 0 to 1"),
        (("digits", "--round-to", "some"), "round_to: wanted 'auto' or a whole number, got 'some'"),
        (("digits", "--round-to", "0"), "round_to: wanted"),
        (("digits", "--ignore", "nothing.*"), "nothing.*"),
    ],
)
def test_bad_input(capsys, arguments, message):
    code, out, err = doctor(capsys, *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_a_wrong_input_shape(capsys):
    code, _, err = doctor(capsys, "digits", "--input", "3,8,8")
    assert code == 2
    assert "Traceback" not in err
    assert "example_inputs: the model's forward pass raises with them: RuntimeError" in err
