"""What the tests of the drive loop do with a worker, and read of its log."""


def until_idle(worker) -> list[str]:
    states = []
    while (state := worker.run_once()) != "idle":
        states.append(state)
    return states


def records(plane):
    plane.log.rewind()
    return [(one.kind, one.seq) for one in plane.log.poll(10_000) if one.kind != "end"]
