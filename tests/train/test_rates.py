import pytest

from taylor_cuda.train.rates import Schedule, cosine


def test_cosine_goes_from_one_to_zero():
    assert cosine(0, 10) == 1
    assert cosine(5, 10) == pytest.approx(0.5)
    assert cosine(10, 10) == pytest.approx(0)
    assert cosine(12, 10) == pytest.approx(0)
    assert cosine(0, 0) == 1


def test_warm_up_is_linear_and_belongs_to_the_whole():
    rate = Schedule(0.8, total=14, kind="cosine", warmup=4)
    assert [rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rate(4) == 0.8
    assert rate(9) == pytest.approx(0.4)
    assert rate(14) == pytest.approx(0)


def test_steps_drop_the_rate_by_a_factor():
    rate = Schedule(1e-3, total=100, kind="step", drop_every=10, drop=0.1)
    assert [rate(step) for step in (0, 9, 10, 19, 20, 99)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-12])


def test_a_constant_rate_stays():
    assert {Schedule(0.3)(step) for step in range(5)} == {0.3}
