"""Connected components and frozen classes, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from taylor_cuda.graph.flow import Flow
from taylor_cuda.graph.labels import FREE, NEVER, Labels, Reason, connected
from taylor_cuda.graph.units import Units


def by_scipy(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest node of each component."""
    _, component = connected_components(coo_matrix((np.ones(a.size), (a, b)), (count, count)), directed=False)
    smallest = np.full(count, count)
    np.minimum.at(smallest, component, np.arange(count))
    return smallest[component]


@given(st.integers(1, 60), st.data())
def test_components_of_random_graphs(count, data):
    node = st.integers(0, count - 1)
    edges = np.array(data.draw(st.lists(st.tuples(node, node), max_size=2 * count)), dtype=np.int64).reshape(-1, 2)
    assert connected(count, edges[:, 0], edges[:, 1]).tolist() == by_scipy(count, edges[:, 0], edges[:, 1]).tolist()


@pytest.mark.parametrize("shape", ["path", "reversed path", "star", "random"])
def test_components_of_large_graphs(shape):
    count = 200_000
    generator = np.random.default_rng(0)
    order = generator.permutation(count) if shape == "random" else np.arange(count)
    a, b = order[:-1], order[1:]
    if shape == "reversed path":
        a, b = b[::-1].copy(), a[::-1].copy()
    elif shape == "star":
        a = np.full(count - 1, count - 1)
        b = np.arange(count - 1)
    keep = generator.random(count - 1) < (0.9 if shape == "random" else 1.1)
    assert connected(count, a[keep], b[keep]).tolist() == by_scipy(count, a[keep], b[keep]).tolist()


def test_what_meets_no_label_is_frozen_by_the_first_event():
    labels = Labels()
    a, b, c = labels.new(3), labels.new(3), labels.new(2)
    labels.equal(a, b, Reason("joined"))
    labels.equal(b, np.array([FREE, FREE, c[0]]), Reason("met nothing"))
    labels.freeze(a[:1], Reason("later"))
    labels.equal(c, None, Reason("met None", "block", "net.py:3"))
    solved = labels.solve()
    assert solved.root.tolist() == [0, 1, 2, 0, 1, 2, 2, 7]
    text = {
        int(root): "" if solved.event[root] == NEVER else str(solved.reasons[solved.event[root]])
        for root in solved.root
    }
    assert text == {
        0: "met nothing",
        1: "met nothing",
        2: "met None (block, net.py:3)",
        7: "met None (block, net.py:3)",
    }


def test_units_with_other_widths_are_another_group():
    holder = nn.Module()
    holder.p, holder.q = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(7))
    flow = Flow(holder)
    flow.roles |= {("p", 0): "write", ("q", 0): "read"}
    (p,), (q,) = flow.of(holder.p), flow.of(holder.q)
    flow.labels.equal(p[[0, 1, 2, 3, 4, 1, 2]], q, Reason("joined"))
    groups, left = Units(flow, flow.labels.solve()).groups()
    found = {group.name: [member.index.tolist() for member in group.members] for group in groups}
    assert found == {"p": [[[0], [3], [4]], [[0], [3], [4]]], "p#2": [[[1], [2]], [[1, 5], [2, 6]]]}
    assert not left.any()


def test_labels_of_other_lengths_are_refused():
    labels = Labels()
    with pytest.raises(ValueError, match=r"labels of \(3,\) and \(2,\) indices"):
        labels.equal(labels.new(3), labels.new(2), Reason("x"))
