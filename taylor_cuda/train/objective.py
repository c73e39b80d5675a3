"""What a step minimises: cross-entropy of labels, smoothed and mixed, and divergence from a teacher's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taylor_cuda.errors import InputError

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(images, labels int64 [N]) -> (images, targets float [N, classes])``."""


def main_output(outputs: Any) -> Tensor:
    """The logits in what a model returns: itself, ``.logits``, ``["logits"]``, ``["out"]`` or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, Mapping):
        for key in ("logits", "out"):
            if isinstance(outputs.get(key), Tensor):
                return outputs[key]  # type: ignore[no-any-return]
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise InputError(
        f"model: wanted logits as output (a tensor, a tuple or a dict with 'logits'), got {type(outputs).__name__}"
    )


class Objective:
    """The mean loss of a batch.

    ``(1 - weight) · CE(logits, targets) + weight · T² · KL(teacher's softmax at T ‖ logits' softmax at T)``.

    Args:
        label_smoothing: of the cross-entropy, in [0, 1).
        teacher: gives logits for the same images; put into eval mode and run without gradients.
        weight: of its part, in [0, 1].
        temperature: T.

    Source: Hinton, Vinyals, Dean: "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self._smoothing, self._weight, self._temperature = label_smoothing, weight, temperature
        self._teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The loss, a scalar in at least fp32.

        Args:
            logits: ``[N, classes]``.
            targets: int64 ``[N]``, or probabilities ``[N, classes]``.
            images: what the logits were computed from.
        """
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        loss = F.cross_entropy(logits, targets, label_smoothing=self._smoothing)
        if self._teacher is None or self._weight == 0:
            return loss
        with torch.no_grad():
            taught = main_output(self._teacher(images)).to(logits.dtype) / self._temperature
        divergence = F.kl_div(
            F.log_softmax(logits / self._temperature, dim=1),
            F.log_softmax(taught, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - self._weight) * loss + self._weight * self._temperature**2 * divergence


def mixing_of(mixup: float, cutmix: float, classes: int) -> Mixing | None:
    """Mixup and cutmix of torchvision, one of the two for each batch; ``None`` where both are 0.

    Args:
        mixup: both parameters of the Beta distribution; 0: none.
        cutmix: likewise.
        classes: outputs of the network.

    Raises:
        InputError: torchvision isn't installed.
    """
    if not mixup and not cutmix:
        return None
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise InputError(f"mixup, cutmix: they need torchvision ({error}); pip install torchvision") from error
    ways = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)  # type: ignore[no-any-return]
