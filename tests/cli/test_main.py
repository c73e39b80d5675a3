import pytest

from taylor_cuda.cli.main import main


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[0]) == (0, "taylor-cuda")
    code, out, _ = run(capsys, "prune", "--help")
    assert code == 0
    for word in ("--budget", "--resume", "torchvision:NAME", "1000 outputs"):
        assert word in out


@pytest.mark.parametrize("arguments", [(), ("prone",), ("prune", "--no-such-option"), ("prune", "--epochs", "many")])
def test_what_argparse_refuses(capsys, arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "usage:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--criterion", "taylor"), "criterion: wanted one of taylor_fo"),
        (("--budget", "macs=0"), "budget: macs=0.0 isn't a fraction"),
        (("--budget", "macs=1.5"), "budget: macs=1.5 isn't a fraction"),
        (("--budget", "speed=0.5"), "budget: unknown 'speed'"),
        (("--budget", "half"), "budget: can't read 'half'"),
        (("--budget", "macs=0.5", "--budget", "macs=0.6"), "budget: macs stands in it twice"),
        (("--budget", "macs=0.0001"), "the nearest feasible budget is macs="),
        (("--batch", "1"), "batch: wanted passes over at least 2 examples, got 1"),
        (("--lr", "-1"), "lr: wanted a number above 0"),
        (("--every", "0"), "every: wanted a number of at least 1"),
        (("--round-to", "some"), "round_to: wanted 'auto' or a whole number"),
        (("--ignore", "no.such.module"), "no.such.module"),
        (("--device", "warp"), "device: 'warp' can't be used here"),
        (("--data", "no/such/folder"), "data: no folder no/such/folder"),
        (("--weights", "none.safetensors"), "weights: no file none.safetensors"),
        (("--num-classes", "4"), "wanted logits [N, 10 or more] for the 10 classes of digits"),
        (("torchvision:resnet81",), "torchvision has no model named 'resnet81'"),
        (("torchvision:resnet18",), "can't run on images of shape [1, 8, 8]"),
        (("--resume",), "there is nothing to go on from"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "prune", *arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint_as_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    code, _, err = run(capsys, "prune", "--weights", "w.safetensors")
    assert code == 2
    assert "w.safetensors" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_out_that_is_a_file(capsys, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    code, _, err = run(capsys, "prune", "--out", tmp_path / "taken")
    assert code == 2
    assert "taken" in err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"
