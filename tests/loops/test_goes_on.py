"""After a cut every loop goes on, bit for bit, as one that starts from a freshly built small network."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from tests.loops.loop import WIDTHS, DictAverage, Loop, Net, Parts, batches, sliced_state


def timm_optimizer(name: str) -> Any:
    def make(parameters: Any) -> Any:
        optim = pytest.importorskip("timm.optim")
        return getattr(optim, name)(parameters, lr=1e-2)

    return make


def timm_average(name: str) -> Any:
    return lambda model: getattr(pytest.importorskip("timm.utils"), name)(model, decay=0.9)


def scaler(scale: float = 2.0**16) -> Any:
    return partial(torch.amp.GradScaler, "cpu", init_scale=scale, growth_interval=7)


LOOPS = {
    "plain": Parts(),
    "accumulation": Parts(micro=4),
    "accumulation-activations": Parts(micro=2, source="activations"),
    "accumulation-update": Parts(micro=2, update="after"),
    "fp16-scaler": Parts(scaler=scaler(2.0**22), autocast=torch.float16),
    "fp16-scaler-activations": Parts(scaler=scaler(2.0**22), autocast=torch.float16, source="activations"),
    "fp16-scaler-accumulation-clipping": Parts(scaler=scaler(), autocast=torch.float16, micro=2, clip=0.1),
    "fp16-update-before-unscaling": Parts(scaler=scaler(), autocast=torch.float16, update="before", clip=0.5),
    "fp16-update-after-unscaling": Parts(scaler=scaler(), autocast=torch.float16, update="after", clip=0.5),
    "fp16-scaler-fused": Parts(partial(AdamW, lr=1e-2, fused=True), scaler=scaler(2.0**22), autocast=torch.float16),
    "bf16-autocast": Parts(autocast=torch.bfloat16),
    "clipping": Parts(clip=0.1),
    "ema-averaged-model": Parts(ema=lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9))),
    "ema-averaged-model-buffers": Parts(
        ema=lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ),
    "ema-timm-v2": Parts(ema=timm_average("ModelEmaV2")),
    "ema-timm-v3": Parts(ema=timm_average("ModelEmaV3")),
    "ema-dict": Parts(ema=DictAverage),
    "adam-foreach": Parts(partial(Adam, lr=1e-2, foreach=True)),
    "adam-fused": Parts(partial(Adam, lr=1e-2, fused=True)),
    "adamw-amsgrad": Parts(partial(AdamW, lr=1e-2, amsgrad=True, weight_decay=0.1)),
    "rmsprop": Parts(partial(RMSprop, lr=1e-3, momentum=0.9)),
    "adagrad": Parts(partial(Adagrad, lr=1e-2)),
    "timm-lamb": Parts(timm_optimizer("Lamb")),
    "timm-lars": Parts(timm_optimizer("Lars")),
    "schedule-cosine": Parts(schedule=partial(CosineAnnealingLR, T_max=40)),
    "schedule-one-cycle": Parts(
        partial(SGD, lr=0.05, momentum=0.9, nesterov=True), schedule=partial(OneCycleLR, max_lr=0.1, total_steps=45)
    ),
    "compile-eager": Parts(compile="eager"),
    "compile-aot": Parts(partial(AdamW, lr=1e-2), compile="aot_eager"),
    "compile-activations": Parts(compile="eager", source="activations"),
    "taylor-fg": Parts(criterion="taylor_fg"),
}


@pytest.mark.parametrize("parts", LOOPS.values(), ids=LOOPS)
def test_the_second_half_is_that_of_a_freshly_built_small_network(parts: Parts) -> None:
    data = batches(40)
    loop = Loop(parts, Net())
    pruner = loop.pruner()
    alive = []
    for batch in data[:19]:
        alive.append(loop.step(batch, pruner))
        assert pruner.step() is None
    alive.append(loop.step(data[19], pruner))
    groups, names = list(pruner.groups), [name for name, _ in loop.model.named_parameters()]
    state = copy.deepcopy(loop.state_dict())
    plan = pruner.step()
    assert plan is not None

    widths, state = sliced_state(state, names, groups, plan.keep)
    assert widths == loop.model.widths()
    assert all(small < large for small, large in zip(widths, WIDTHS, strict=True))
    fresh = Loop(parts, Net(*widths))
    fresh.load_state_dict(state)
    for batch in data[20:]:
        loop.step(batch, pruner)
        fresh.step(batch)
    results, expected = loop.results(), fresh.results()
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    assert pruner.importance.steps + pruner.importance.skipped == 20
    if parts.scaler:
        assert pruner.skipped == loop.overflows
    if parts.autocast == torch.float16 and parts.clip is None:
        assert 0 < pruner.skipped < 20
