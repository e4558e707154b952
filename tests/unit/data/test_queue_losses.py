"""Samples that one rank's view of the log has lost: captured again, or given up."""

from tests.unit.data.queues import lease_and_publish, publish, queue_of, soon, unwanted


def test_a_lost_sample_is_captured_again(plane):
    queue = queue_of(plane)
    refs = lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[2]
    again = {}
    soon(lambda: again.update(lease_and_publish(plane)))
    replaced = queue.fail(2, ref, "gone")
    assert replaced == again[2]
    assert replaced.origin.attempt == 1
    assert queue.recaptured == [2]
    assert unwanted(queue.ack(4)) == [refs[2]]


def test_the_new_ref_came_before_the_loss_was_noticed(plane):
    """A lease that expired between append and commit: both attempts are in the log when the older is read."""
    queue = queue_of(plane)
    publish(plane, 0, 1)
    ref = queue.get(range(2), range(2)).refs[0]
    newer = publish(plane, 0, attempt=1)
    publish(plane, 2, 3)
    queue.get(range(2, 4), range(2, 4))  # reads on, ahead of the trainer
    assert queue.fail(0, ref, "gone") == newer[0]


def test_a_sample_that_is_lost_too_often_is_skipped_for_every_reader(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    for _ in range(2):
        soon(lambda: lease_and_publish(plane))
        ref = queue.fail(0, ref, "gone")
        assert ref is not None
    assert queue.fail(0, ref, "gone for good") is None
    assert queue.skipped == {0: "gone for good"}
    other = queue_of(plane)
    assert other.get(range(4), range(4)).refs[0] is None
    assert other.skipped == {0: "gone for good"}


def test_what_cannot_be_captured_again_is_skipped_at_once(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    assert queue.fail(0, ref, "damaged", retryable=False) is None


def test_another_rank_gave_the_sample_up_while_this_one_waited(plane):
    queue = queue_of(plane)
    lease_and_publish(plane)
    ref = queue.get(range(4), range(4)).refs[0]
    soon(lambda: plane.skip([0], "capture failed: too long"))
    assert queue.fail(0, ref, "gone") is None
    assert queue.skipped == {0: "capture failed: too long"}


def test_forgotten_samples_are_waited_for(plane):
    queue = queue_of(plane)
    publish(plane, 0, 1)
    queue.catch_up()
    queue.forget([1])
    again = {}
    soon(lambda: again.update(publish(plane, 1, attempt=1)))
    assert queue.get(range(2), range(2)).refs[1] == again[1]
