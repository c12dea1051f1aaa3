"""Rows of many callers, scored together: who gets which answer, what is scored with what, what a fault of one row does."""

import threading
from concurrent.futures import wait

import pytest

from entra import ScoreConfig
from entra.encode import EncodedRow
from entra.serve.micro_batches import Limits, MicroBatches

CONFIG, OTHER = ScoreConfig(), ScoreConfig(protect_fraction=0.5)


def row(name, tokens=4):
    return EncodedRow([name], [0] * (tokens - 1))


class Model:
    """Answers a row with its name, once it is let go, and remembers what was scored together."""

    def __init__(self):
        self.batches, self.free = [], threading.Event()
        self.free.set()

    def __call__(self, rows, config):
        assert self.free.wait(20)
        self.batches.append(([r.prompt[0] for r in rows], config))
        if any(r.prompt[0] < 0 for r in rows):
            raise RuntimeError("out of\nmemory.")
        return [f"answer: {r.prompt[0]}" for r in rows]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def queue(model):
    queue = MicroBatches(model, batch_tokens=10, max_wait=0.0)
    yield queue
    model.free.set()
    queue.close()


def held(model, queue):
    """The model is busy with row 0 until it is let go; everything else waits."""
    model.free.clear()
    (first,) = queue.submit([row(0)], CONFIG)
    while queue.waiting:
        pass
    return first


def answers(futures):
    wait(futures, 20)
    return [future.result(0) for future in futures]


def test_every_caller_gets_the_answers_to_its_rows(model, queue):
    callers = []
    threads = [
        threading.Thread(target=lambda i=i: callers.append((i, queue.submit([row(i), row(i + 100)], CONFIG))))
        for i in range(30)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(callers) == 30
    for i, futures in callers:
        assert answers(futures) == [f"answer: {i}", f"answer: {i + 100}"]


def test_batches_take_the_oldest_first_up_to_the_tokens_and_a_row_always_fits(model, queue):
    first = held(model, queue)
    futures = queue.submit([row(1), row(2), row(3), row(4, tokens=99), row(5)], CONFIG)
    model.free.set()
    assert answers([first, *futures]) == [f"answer: {i}" for i in range(6)]
    assert [names for names, _ in model.batches] == [[0], [1, 2], [3, 5], [4]]


def test_rows_of_different_options_are_not_scored_together(model, queue):
    first = held(model, queue)
    one, other = queue.submit([row(1), row(2)], CONFIG), queue.submit([row(3)], OTHER)
    model.free.set()
    assert answers([first, *one, *other]) == [f"answer: {i}" for i in range(4)]
    assert model.batches == [([0], CONFIG), ([1, 2], CONFIG), ([3], OTHER)]


def test_a_row_that_makes_the_model_fail_harms_no_neighbour(model, queue):
    first = held(model, queue)
    futures = queue.submit([row(1), row(-2)], CONFIG)
    model.free.set()
    assert answers([first, *futures]) == ["answer: 0", "answer: 1", "failed: out of memory"]
    assert not queue.is_broken


def test_a_model_that_always_fails_is_broken_until_something_is_scored(model, queue):
    for _ in range(3):
        assert not queue.is_broken
        assert answers(queue.submit([row(-1)], CONFIG)) == ["failed: out of memory"]
    assert queue.is_broken
    assert answers(queue.submit([row(1)], CONFIG)) == ["answer: 1"]
    assert not queue.is_broken


def test_what_nobody_waits_for_any_more_is_not_scored(model, queue):
    first = held(model, queue)
    gone, stays = queue.submit([row(1), row(2)], CONFIG), queue.submit([row(3)], CONFIG)
    queue.discard([first, *gone])  # the first is being scored already
    assert queue.waiting == 1
    model.free.set()
    assert answers([first, *stays]) == ["answer: 0", "answer: 3"]
    assert [names for names, _ in model.batches] == [[0], [3]]


def test_it_waits_for_more_but_no_longer_than_it_is_told(model):
    queue = MicroBatches(model, batch_tokens=10, max_wait=0.2)
    futures = [*queue.submit([row(1)], CONFIG), *queue.submit([row(2)], CONFIG)]
    assert answers(futures) == ["answer: 1", "answer: 2"]
    assert [names for names, _ in model.batches] == [[1, 2]]
    queue.close()


def test_closing_scores_what_waits_and_takes_nothing_more(model, queue):
    first = held(model, queue)
    futures = queue.submit([row(1), row(2), row(3)], CONFIG)
    closing = threading.Thread(target=queue.close)
    closing.start()
    model.free.set()
    closing.join(20)
    assert answers([first, *futures]) == [f"answer: {i}" for i in range(4)]
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit([row(4)], CONFIG)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 0}, "max_rows=0 must be at least 1 rows"),
        ({"max_rows": 9, "queue_rows": 8}, "max_rows=9 must be at most queue_rows=8"),
        ({"max_tokens": 9, "queue_tokens": 8}, "max_tokens=9 must be at most queue_tokens=8"),
        ({"bad_row_reward": float("nan")}, "bad_row_reward=nan"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_rows_that_nobody_waits_for_are_not_counted(model):
    seen = []
    queue = MicroBatches(
        model, batch_tokens=10, max_wait=0.0, observe=lambda rows, tokens, seconds: seen.append((rows, tokens))
    )
    first = held(model, queue)
    gone = queue.submit([row(1), row(2)], CONFIG)
    assert all(answer.cancel() for answer in gone)
    model.free.set()
    assert answers([first]) == ["answer: 0"]
    queue.close()
    assert seen == [(1, 4)]
