"""What ranks cost a Redis: each reads all references.

`python -m benchmarks.readers` publishes references, then lets 1, 8 and 64 readers take them in one after the other, and
prints what one more rank and one more reference cost the server and the network, in CPU time.
"""

import argparse
import tempfile
import time

from benchmarks.references import reference
from lightning_dataflow.contracts import LogRecord
from lightning_dataflow.control.redis.log import RedisChannel
from lightning_dataflow.control.redis.server import RedisServer
from lightning_dataflow.services.redis import LocalRedis


def counters(server: RedisServer) -> tuple[float, int]:
    """CPU seconds of the server, and bytes that it sent."""
    lines = server.ask("INFO", "ALL").decode().split()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"]), int(found["total_net_output_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--refs", type=int, default=5120)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--readers", type=int, nargs="+", default=(1, 8, 64))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalRedis(folder) as local:
        server = RedisServer(local.where, "bench")
        log = RedisChannel(server)
        log.announce({"run_id": "bench"})
        for first in range(0, options.refs, options.group):
            log.publish(
                [LogRecord(kind="ref", seq=seq, ref=reference(seq, 0)) for seq in range(first, first + options.group)]
            )
        print(f"{options.refs} refs in groups of {options.group}")
        print("| readers | server's CPU, µs a ref | sent, bytes a ref | reader's CPU, µs a ref and reader |")
        print("|---|---|---|---|")
        for readers in options.readers:
            channels = [RedisChannel(server) for _ in range(readers)]
            cpu, sent = counters(server)
            own = time.process_time()
            for channel in channels:
                while channel.poll():
                    pass
            more_cpu, more_sent = counters(server)
            micros = 1e6 * (time.process_time() - own) / options.refs / readers
            print(
                f"| {readers} | {1e6 * (more_cpu - cpu) / options.refs:.2f} | {(more_sent - sent) / options.refs:.0f} | "
                f"{micros:.2f} |"
            )


if __name__ == "__main__":
    main()
