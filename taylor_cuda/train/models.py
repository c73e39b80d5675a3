"""Models by name: the embedded default, the libraries' zoos, and factories of one's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from taylor_cuda.errors import CheckpointError, InputError
from taylor_cuda.surgery import load
from taylor_cuda.train.factories import call_factory, find_factory, split_spec, unknown_name
from taylor_cuda.train.messages import first_line_and_place

PRETRAINED = ("pretrained", "DEFAULT")
"""Values of ``weights`` that ask a library for its own weights."""

SPEC_FORMS = "'digits', 'timm:NAME', 'torchvision:NAME', 'package.module:factory' or 'path/to/file.py:factory'"


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, added to the input (or to its 1×1 projection where the shape changes).

    Source: He, Zhang, Ren, Sun: "Deep Residual Learning for Image Recognition", CVPR 2016, the basic block.
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """The embedded default: a residual network for 8×8 images in two stages, the second twice as wide.

    Convolutions start as in residual networks everywhere: normal, scaled to the outputs (He et al., ICCV 2015).

    Args:
        num_classes: outputs of the head.
        width: channels of the first stage.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, width))
        self.stage2 = nn.Sequential(ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 2 * width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 1, 8, 8]`` to logits ``[N, num_classes]``."""
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def load_model(spec: str, num_classes: int | None = None, weights: str | None = None) -> nn.Module:
    """The model a user named, with the weights a user named.

    Args:
        spec: ``"digits"``, ``"timm:NAME"``, ``"torchvision:NAME"``, ``"package.module:factory"`` (also found from the
            current folder) or ``"path/to/file.py:factory"``. A factory is called without arguments.
        num_classes: outputs of the head; ``None`` leaves the head the model comes with (1000 in the zoos), so that the
            saved file fits what the same factory makes anywhere else. Factories get it as ``num_classes=`` only where
            it is given.
        weights: a ``tc.save`` checkpoint (``.safetensors``; the model comes out cut), a ``state_dict`` (``.pt``,
            ``.pth``), or ``"pretrained"`` / ``"DEFAULT"`` for the library's own, which may be downloaded; torchvision's
            have names besides, such as ``"IMAGENET1K_V1"``. ``None``: random.

    Raises:
        InputError: the name, the library or the factory isn't there, or what it gives isn't a module.
        CheckpointError: the weights can't be read or belong to another model.
    """
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes: wanted a number >= 1, got {num_classes}")
    own = weights in PRETRAINED or (spec.startswith("torchvision:") and _may_be_a_name(weights))
    model = _build(spec, num_classes, weights if own else None)
    if weights is None or own:
        return model
    return load_weights(model, Path(weights))


def default_input_shape(spec: str, model: nn.Module) -> tuple[int, ...]:
    """Shape of one example where there is no data: the model's own if it says so, else ``(3, 224, 224)``."""
    if isinstance(model, DigitsResNet):
        return (1, 8, 8)
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") if spec.startswith("timm:") else None
    return tuple(size) if size else (3, 224, 224)


def layer_widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs of every convolution and linear layer, before and after pruning, in the order of the modules."""
    kinds = (_ConvNd, nn.Linear)
    then = {name: _outputs(module) for name, module in before.named_modules() if isinstance(module, kinds)}
    now = {name: _outputs(module) for name, module in after.named_modules() if isinstance(module, kinds)}
    return {name: (width, now[name]) for name, width in then.items() if name in now}


def _outputs(module: _ConvNd | nn.Linear) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _may_be_a_name(weights: str | None) -> bool:
    return weights is not None and not Path(weights).suffix and not Path(weights).exists()


def _build(spec: str, num_classes: int | None, own_weights: str | None) -> nn.Module:
    if spec == "digits":
        _refuse_pretrained(spec, own_weights)
        return DigitsResNet(num_classes or 10)
    library, name = split_spec("model", spec, SPEC_FORMS)
    if library == "timm":
        return _from_timm(name, num_classes, pretrained=own_weights is not None)
    if library == "torchvision":
        return _from_torchvision(name, num_classes, own_weights)
    _refuse_pretrained(spec, own_weights)
    return _from_factory(library, name, num_classes)


def _refuse_pretrained(spec: str, own_weights: str | None) -> None:
    if own_weights is not None:
        raise InputError(f"weights: {spec!r} comes with no pretrained weights; give a .safetensors, .pt or .pth file")


def _from_timm(name: str, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise unknown_name("model", "timm", name, timm.list_models())
    head = {} if num_classes is None else {"num_classes": num_classes}
    return _fetch(f"timm:{name}", lambda: timm.create_model(name, pretrained=pretrained, **head), pretrained)


def _from_torchvision(name: str, num_classes: int | None, weights: str | None) -> nn.Module:
    models = _library("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise unknown_name("model", "torchvision", name, names)
    if weights is None:
        head = {} if num_classes is None else {"num_classes": num_classes}
        # These two warn, and spend a minute on a truncated normal, unless told how to initialise.
        quick = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return models.get_model(name, weights=None, **head, **quick)  # type: ignore[no-any-return]
    own = [entry.name for entry in models.get_model_weights(name)]
    if weights not in (*PRETRAINED, *own):
        raise InputError(f"weights: wanted a file or one of {', '.join((*PRETRAINED, *own))}, got {weights!r}")
    chosen = "DEFAULT" if weights in PRETRAINED else weights
    model = _fetch(f"torchvision:{name}", lambda: models.get_model(name, weights=chosen), pretrained=True)
    return model if num_classes is None else _with_head(model, num_classes)


def _with_head(model: nn.Module, num_classes: int) -> nn.Module:
    """Put a fresh last linear layer of ``num_classes`` outputs into a pretrained model."""
    name, last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    if last.out_features != num_classes:
        parent, _, attribute = name.rpartition(".")
        head = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
        setattr(model.get_submodule(parent), attribute, head)
    return model


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"model: {name} is not installed ({error}); pip install {name}") from error


def _fetch(spec: str, make: Callable[[], Any], pretrained: bool) -> nn.Module:
    """Run a library's constructor; what can go wrong in a download is the user's to know, not a traceback."""
    try:
        return make()  # type: ignore[no-any-return]
    except Exception as error:
        if not pretrained:
            raise InputError(f"model: {spec} can't be made: {first_line_and_place(error)}") from error
        raise InputError(
            f"weights: the pretrained weights of {spec} can't be had ({first_line_and_place(error)}); "
            "download them elsewhere and give the file"
        ) from error


def _from_factory(source: str, name: str, num_classes: int | None) -> nn.Module:
    spec, factory = f"{source}:{name}", find_factory("model", source, name, SPEC_FORMS)
    arguments = {}
    if num_classes is not None:
        if "num_classes" not in inspect.signature(factory).parameters:
            raise InputError(f"num_classes: {spec} takes no argument of that name")
        arguments["num_classes"] = num_classes
    model = call_factory("model", spec, factory, arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {spec} returned a {type(model).__name__}, wanted a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a ``tc.save`` checkpoint or a ``state_dict`` file into ``model``; nothing in the file is executed.

    A ``state_dict`` may stand under ``"state_dict"`` or ``"model"`` and carry the ``module.`` prefix of a distributed
    wrapper.
    """
    if not path.is_file():
        raise InputError(f"weights: no file {path} (wanted a .safetensors, .pt or .pth file, or 'pretrained')")
    if path.suffix == ".safetensors":
        return load(model, path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"weights: {path} can't be read as a state_dict: {first_line_and_place(error)}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"weights: {path} holds no state_dict (a dict of tensors)")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"weights: {path} belongs to another model: {_differences(error)}") from error
    return model


def _differences(error: RuntimeError, most: int = 4) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    more = f" … and {len(lines) - most} more" if len(lines) > most else ""
    return " ".join(lines[:most])[:600] + more
