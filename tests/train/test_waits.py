import time

import pytest

from taylor_cuda.train.waits import Waits


def slowly(count, seconds):
    for item in range(count):
        time.sleep(seconds)
        yield item
    time.sleep(seconds)


def test_only_waiting_is_counted():
    waits, started = Waits(), time.perf_counter()
    items = []
    for item in waits.timed(slowly(3, 0.02)):
        time.sleep(0.03)
        items.append(item)
    total = time.perf_counter() - started
    assert items == [0, 1, 2]
    assert 4 * 0.02 <= waits.seconds <= total - 3 * 0.03  # until the end is known, too
    assert waits.share(total) == waits.seconds / total
    before = waits.seconds
    assert list(waits.timed(slowly(1, 0.01))) == [0]
    assert waits.seconds >= before + 0.02


def test_an_error_comes_through_and_counts():
    def broken():
        yield 1
        time.sleep(0.01)
        raise ValueError("torn")

    waits = Waits()
    with pytest.raises(ValueError, match="torn"):
        list(waits.timed(broken()))
    assert waits.seconds >= 0.01


def test_nothing_took_no_time():
    assert Waits().share(0.0) == 0.0
