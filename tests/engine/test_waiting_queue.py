from gemma_serve.engine.sequence import Sequence
from gemma_serve.engine.waiting_queue import WaitingQueue
from tests.engine.builders import make_block_manager, make_sequence


def waiting(*users: str | None) -> tuple[WaitingQueue, list[Sequence]]:
    """A queue with one sequence per entry."""
    manager, queue = make_block_manager(), WaitingQueue()
    sequences = [
        make_sequence(manager, arrival=arrival, user=user) for arrival, user in enumerate(users)
    ]
    for sequence in sequences:
        queue.add(sequence)
    return queue, sequences


def take_all(queue: WaitingQueue) -> list[int]:
    arrivals = []
    while (sequence := queue.next()) is not None:
        queue.take(sequence)
        arrivals.append(sequence.arrival)
    assert len(queue) == 0
    return arrivals


def test_users_take_turns_and_each_ones_requests_keep_their_order() -> None:
    queue, _ = waiting("ann", "ann", "ann", "bob", None, "bob", None)
    assert take_all(queue) == [0, 3, 4, 1, 5, 6, 2]


def test_smaller_priorities_go_first_among_a_users_own_and_pass_no_other_user() -> None:
    manager, queue = make_block_manager(), WaitingQueue()
    for arrival, (user, priority) in enumerate(
        [("ann", 0), ("bob", 0), ("ann", -1), ("ann", 2), ("bob", -9), ("ann", -1)]
    ):
        queue.add(make_sequence(manager, arrival=arrival, user=user, priority=priority))
    assert take_all(queue) == [2, 4, 5, 1, 0, 3]


def test_a_user_who_comes_back_stands_behind_those_who_wait() -> None:
    queue, sequences = waiting("ann", "bob")
    queue.take(sequences[0])
    queue.add(sequences[0])
    assert take_all(queue) == [1, 0]


def test_preempted_ones_go_first_in_the_order_of_their_turns() -> None:
    queue, sequences = waiting("ann", "bob", "ann", "cid")
    for turn, sequence in enumerate((sequences[1], sequences[0])):
        queue.take(sequence)
        sequence.turn = turn
    queue.add_preempted(sequences[0])
    queue.add_preempted(sequences[1])
    assert take_all(queue) == [1, 0, 3, 2]


def test_who_is_passed_over_holds_up_its_own_user_only() -> None:
    queue, sequences = waiting("ann", "ann", "bob")
    assert queue.next(but_not=[sequences[0]]) is sequences[2]
    assert queue.next(but_not=[sequences[0], sequences[2]]) is None
    assert queue.next() is sequences[0]


def test_one_that_leaves_is_gone() -> None:
    queue, sequences = waiting("ann", "ann", "bob")
    queue.discard(sequences[0])
    assert (len(queue), take_all(queue)) == (2, [1, 2])
