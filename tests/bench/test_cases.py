from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from taylor_cuda.bench.cases import (
    ActivationCase,
    flat_in_memory,
    input_sets,
    parameter_bytes,
    resnet_gates,
    resnet_parameters,
)
from taylor_cuda.bench.suites.scoring import PEERS, exact, torch_line
from taylor_cuda.bench.suites.weights import TINY, parameter_set, per_layer
from taylor_cuda.ops import reference

CASES = [
    ActivationCase((3, 5, 6, 7), torch.float32, "nchw"),
    ActivationCase((3, 5, 6, 7), torch.bfloat16, "channels_last"),
    ActivationCase((3, 8, 17), torch.float16, "tokens"),
    ActivationCase((3, 8), torch.float32, "rows"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_bytes_are_those_of_the_tensors(case):
    activation, gradient = case.inputs("cpu", 0)
    assert activation.shape == case.shape
    assert activation.dtype == case.dtype
    for op, result in (
        ("channel_importance", reference.channel_importance(activation, gradient)),
        ("channel_sums", reference.channel_sums(activation, gradient)),
    ):
        assert case.bytes(op) == activation.nbytes + gradient.nbytes + result.nbytes
    assert case.flops == 2 * activation.numel()


def test_layouts_lie_in_memory_as_they_are_called():
    channels_last = CASES[1].inputs("cpu", 0)[0]
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    tokens = CASES[2].inputs("cpu", 0)[0]
    assert tokens.stride() == (17 * 8, 1, 8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_flat_in_memory_is_a_view_of_the_same_numbers(case):
    activation, gradient = case.inputs("cpu", 0)
    flat = flat_in_memory(activation)
    assert flat.is_contiguous()
    assert flat.data_ptr() == activation.data_ptr()
    both = (flat.double() * flat_in_memory(gradient).double()).sum()
    torch.testing.assert_close(both, (activation.double() * gradient.double()).sum())


def test_inputs_differ_between_sets_and_between_the_two_tensors():
    case = CASES[0]
    first, second = case.inputs("cpu", 0), case.inputs("cpu", 1)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], case.inputs("cpu", 0)[0])


def test_input_sets_overflow_the_cache_three_times():
    assert input_sets(100, 100) == 3
    assert input_sets(299, 100) == 2
    assert input_sets(300, 100) == 1
    assert input_sets(300, 100, least=2) == 2
    assert input_sets(1, 10**9) == 8


def hooked_gates(network):
    """What a forward pass of torchvision's network really has after both inner normalisations and after each block."""
    models = pytest.importorskip("torchvision.models")
    seen = Counter()

    def note(_module, _args, output):
        seen[output.shape[1], output.shape[2]] += 1

    with torch.device("meta"):
        model = getattr(models, network)(weights=None)
        for name, module in model.named_modules():
            if name.startswith("layer") and (name.endswith(("bn1", "bn2")) or type(module).__name__ == "Bottleneck"):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, 224, 224))
    return seen, model


@pytest.mark.parametrize(("network", "gates"), [("resnet50", 48), ("resnet101", 99)])
def test_gates_and_parameters_are_torchvisions(network, gates):
    seen, model = hooked_gates(network)
    assert resnet_gates(network) == seen
    assert seen.total() == gates
    ours = Counter(shape for _, shape in resnet_parameters(network))
    assert ours == Counter(tuple(parameter.shape) for parameter in model.parameters())
    linear = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]
    assert [shape for kind, shape in resnet_parameters(network) if kind == "linear"] == linear


@pytest.mark.parametrize("side", ["readers", "writers"])
@pytest.mark.parametrize("layout", ["parameters", "channels_last"])
def test_parameter_sets_are_views_of_the_flat_buffers(side, layout):
    parameters = parameter_set(TINY, side, torch.float32, layout, "cpu", seed=0)
    assert sum(weight.numel() for weight in parameters.weights) == parameters.flat_weights.numel()
    start = parameters.flat_weights.data_ptr()
    assert all(start <= weight.data_ptr() < start + parameters.flat_weights.nbytes for weight in parameters.weights)
    convolution = parameters.weights[0]
    assert convolution.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    expected = (parameters.flat_weights.double() * parameters.flat_gradients.double()).sum()
    torch.testing.assert_close(torch.cat(per_layer(parameters)).double().sum(), expected, rtol=1e-4, atol=1e-4)
    sizes = [3, 16, 16, 16, 24] if side == "readers" else [16, 16, 16, 24, 10, 10]
    assert [len(one) for one in per_layer(parameters)] == sizes
    pairs = list(zip(parameters.weights, parameters.gradients, strict=True))
    read = parameters.flat_weights.nbytes + parameters.flat_gradients.nbytes
    assert parameter_bytes(pairs, parameters.results) == read + 4 * sum(sizes)


@pytest.mark.parametrize(
    "op", ["channel_sums", *(f"channel_importance:{name}" for name in (*reference.CHANNEL_REDUCTIONS, "all"))]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_the_peers_line_is_the_definition(op, case):
    """In float64, so that only the formula counts."""
    inputs = tuple(x.double() for x in case.inputs("cpu", 0))
    expected, _ = exact(inputs).of(op, "float32")
    torch.testing.assert_close(torch_line(op)(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, peers in PEERS.items() for name in peers])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_further_peers_compute_the_same(op, name, case):
    inputs = tuple(x.float() for x in case.inputs("cpu", 0))
    expected, _ = exact(inputs).of(op, "float32")
    torch.testing.assert_close(PEERS[op][name](*inputs).double(), expected, rtol=1e-4, atol=1e-5)
