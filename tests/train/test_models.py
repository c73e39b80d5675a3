import pytest
import torch
import torchvision
from torch import nn

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.train.models import DigitsResNet, default_input_shape, layer_widths, load_model

FACTORIES = """
from torch import nn

NUMBER = 3


def make_net(num_classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def make_text():
    return "not a model"


def make_trouble():
    raise KeyError("no such layer")
"""


@pytest.fixture
def factories(tmp_path):
    path = tmp_path / "my_models.py"
    path.write_text(FACTORIES, encoding="utf-8")
    return path


def test_default_has_two_stages_and_ten_outputs():
    model = load_model("digits")
    assert isinstance(model, DigitsResNet)
    assert model.stage2[0].conv1.out_channels == 2 * model.stage1[0].conv1.out_channels
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert load_model("digits", num_classes=7)(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


def test_zoo_models_keep_their_head_unless_told():
    assert load_model("torchvision:resnet18").fc.out_features == 1000
    assert load_model("torchvision:resnet18", num_classes=5).fc.out_features == 5
    assert load_model("timm:resnet18").fc.out_features == 1000
    assert load_model("timm:resnet18", num_classes=5).fc.out_features == 5


def test_factory_in_a_file_and_in_a_package(factories, monkeypatch):
    assert load_model(f"{factories}:make_net")[1].out_features == 4
    assert load_model(f"{factories}:make_net", num_classes=9)[1].out_features == 9
    monkeypatch.chdir(factories.parent)  # a plain script's folder is not on sys.path of an installed command
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    assert load_model("my_models:make_net")[1].out_features == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "wanted 'digits', 'timm:NAME'"),
        ("torchvision:", "wanted 'digits', 'timm:NAME'"),
        ("torchvision:resnet81", r"no model named 'resnet81'; the nearest are .*resnet18"),
        ("timm:resnett50", r"no model named 'resnett50'; the nearest are .*resnet50"),
        ("nowhere.at_all:make", "no module named 'nowhere'"),
        ("missing_file.py:make", "no file missing_file.py"),
        ("torch:no_such_thing_here", "torch has no model named 'no_such_thing_here'"),
    ],
)
def test_unknown_models_are_named(spec, message):
    with pytest.raises(InputError, match=message):
        load_model(spec)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make_nett", "the nearest are make_net"),
        ("NUMBER", "is a int, wanted a function"),
        ("make_text", "returned a str, wanted a torch.nn.Module"),
        ("make_trouble", r"failed: KeyError: 'no such layer' at .*my_models.py:16"),
    ],
)
def test_bad_factories_are_named(factories, name, message):
    with pytest.raises(InputError, match=message):
        load_model(f"{factories}:{name}")


def test_file_with_an_error_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\nvalue = 1 / 0\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero at .*broken.py:2"):
        load_model(f"{tmp_path / 'broken.py'}:make")


def test_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(InputError, match=r"timm is not installed .*pip install timm"):
        load_model("timm:resnet18")


def test_num_classes_has_to_fit(factories):
    with pytest.raises(InputError, match="takes no argument of that name"):
        load_model(f"{factories}:make_text", num_classes=3)
    with pytest.raises(InputError, match="num_classes"):
        load_model("digits", num_classes=0)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_state_dict_weights(tmp_path, wrap):
    model = DigitsResNet()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(wrap(state), tmp_path / "w.pt")
    loaded = load_model("digits", weights=str(tmp_path / "w.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_weights_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_model("digits", weights=str(tmp_path / "none.pt"))
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.pt can't be read"):
        load_model("digits", weights=str(tmp_path / "broken.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        load_model("digits", weights=str(tmp_path / "list.pt"))
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="belongs to another model: Missing key"):
        load_model("digits", weights=str(tmp_path / "other.pt"))


def test_pickled_code_in_weights_is_refused(tmp_path):
    torch.save({"model": DigitsResNet()}, tmp_path / "object.pt")
    with pytest.raises(CheckpointError, match="can't be read as a state_dict"):
        load_model("digits", weights=str(tmp_path / "object.pt"))


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_pretrained_weights_that_cannot_be_downloaded(spec, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torchvision.models.get_model", offline)
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(InputError, match=r"can't be had \(OSError: Network is unreachable"):
        load_model(spec, weights="pretrained")


def test_pretrained_is_refused_where_there_is_none(factories):
    for spec in ("digits", f"{factories}:make_net"):
        with pytest.raises(InputError, match="comes with no pretrained weights"):
            load_model(spec, weights="pretrained")


def test_pretrained_torchvision_head_is_replaced_on_request(monkeypatch):
    monkeypatch.setattr("torchvision.models.get_model", lambda name, **_: getattr(torchvision.models, name)())
    assert load_model("torchvision:mobilenet_v2", 6, "DEFAULT").classifier[1].out_features == 6
    assert load_model("torchvision:resnet18", None, "DEFAULT").fc.out_features == 1000


def test_default_input_shape_asks_the_model():
    assert default_input_shape("digits", load_model("digits")) == (1, 8, 8)
    assert default_input_shape("timm:inception_v3", load_model("timm:inception_v3")) == (3, 299, 299)
    assert default_input_shape("torchvision:resnet18", nn.Identity()) == (3, 224, 224)


def test_layer_widths_counts_outputs():
    def net(width):
        return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.ConvTranspose2d(width, 5, 2), nn.Linear(4, 2))

    assert layer_widths(net(8), net(3)) == {"0": (8, 3), "2": (5, 5), "3": (2, 2)}


@pytest.mark.parametrize(
    ("weights", "asked"),
    [("pretrained", "DEFAULT"), ("DEFAULT", "DEFAULT"), ("IMAGENET1K_V1", "IMAGENET1K_V1"), (None, None)],
)
def test_weights_that_torchvision_has_names_for(monkeypatch, weights, asked):
    seen, make = [], torchvision.models.get_model

    def get_model(name, weights, **options):
        seen.append(weights)
        return make(name, weights=None, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    model = load_model("torchvision:resnet18", num_classes=7, weights=weights)
    assert seen == [asked]
    assert model.fc.out_features == 7


def test_weights_that_torchvision_does_not_have(tmp_path, monkeypatch):
    wanted = r"weights: wanted a file or one of pretrained, DEFAULT, IMAGENET1K_V1, got 'IMAGENET1K_V9'"
    with pytest.raises(InputError, match=wanted):
        load_model("torchvision:resnet18", weights="IMAGENET1K_V9")
    with pytest.raises(InputError, match=r"weights: no file IMAGENET1K_V1"):
        load_model("digits", weights="IMAGENET1K_V1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGENET1K_V1").write_bytes(b"a file of that name")
    with pytest.raises(CheckpointError, match="IMAGENET1K_V1 can't be read"):
        load_model("torchvision:resnet18", weights="IMAGENET1K_V1")
