import os
import signal
import threading

import pytest

from taylor_cuda.train.stopping import stop_between_steps


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_waits_for_the_check(kind):
    with stop_between_steps() as stop:
        stop.check()
        os.kill(os.getpid(), kind)
        assert stop.asked  # still here: nothing was raised between two bytecodes of a step
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        stop.check()


def test_second_interrupt_is_immediate():
    with stop_between_steps():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_between_steps():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_is_left_alone():
    seen = []

    def work():
        with stop_between_steps() as stop:
            stop.check()
            seen.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def test_one_of_several_ranks_waits_for_the_others_however_often_it_is_asked():
    with stop_between_steps(alone=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
