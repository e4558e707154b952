"""What capture costs a server: prompts per second with capture and without, in turns, on one server.

SGLANG_USE_CPU_ENGINE=1 python -m benchmarks.capture TARGET SGLANG_PYTHON [server flags]
"""

import secrets
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch

from lightning_dataflow.contracts import SampleOrigin
from lightning_dataflow.services.mooncake import LocalMooncake
from lightning_dataflow.services.sglang import LocalSGLang
from lightning_dataflow.stores import MooncakeFeatureStore
from lightning_dataflow.targets import SGLangServerTarget, read_target_info

NUM_PROMPTS, LENGTH, ROUNDS, IN_FLIGHT = 24, 256, 5, 8


def main() -> None:
    path, python, *flags = sys.argv[1:]
    info = read_target_info(path)
    layer_ids = (1, info.num_layers // 2 - 1, info.num_layers - 4)
    with tempfile.TemporaryDirectory() as folder, LocalMooncake(capacity_bytes=1 << 30, log_dir=folder) as mooncake:
        addresses = {"address": mooncake.master_address, "client_address": mooncake.client_address}
        server = LocalSGLang(path, layer_ids, python=python, store=addresses, folder=folder, arguments=flags)
        try:
            store = MooncakeFeatureStore(
                "bench", master_address=mooncake.master_address, metrics_address=mooncake.metrics_address
            )
            target = SGLangServerTarget(
                path,
                urls=[server.url],
                store_id="bench",
                layer_ids=layer_ids,
                store=store,
                api_key=server.api_key,
                in_flight=IN_FLIGHT,
            )
            measure(target, store, info.vocab_size)
            store.close()
        finally:
            server.close()


def measure(target: SGLangServerTarget, store: MooncakeFeatureStore, vocab_size: int) -> None:
    (http,) = target.servers
    prompts = torch.randint(vocab_size, (NUM_PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()

    def stock(prompt: list[int]) -> None:
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        http._request("POST", "/generate", {"rid": secrets.token_hex(16), **body})

    def capture(prompt: list[int]) -> None:
        name = secrets.token_hex(8)
        versions = {
            "target_model_version": target.info.model_version,
            "tokenizer_version": target.info.tokenizer_version,
        }
        origin = SampleOrigin(
            sample_id=name,
            run_id="bench",
            source_task_id=name,
            source_id=name,
            capture=target.capture_spec,
            num_tokens=len(prompt),
            **versions,
        )
        store.free(target.capture_ref(prompt, [1] * len(prompt), origin))

    seconds: dict[str, list[float]] = {"stock": [], "capture": []}
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for action in (stock, capture):
            list(pool.map(action, prompts[:IN_FLIGHT]))
        for _ in range(ROUNDS):
            for name, action in (("stock", stock), ("capture", capture)):
                began = time.perf_counter()
                list(pool.map(action, prompts))
                seconds[name].append(time.perf_counter() - began)
    rates = {name: NUM_PROMPTS * LENGTH / median(values) for name, values in seconds.items()}
    pairs = [there / without for without, there in zip(seconds["stock"], seconds["capture"], strict=True)]
    print(f"{'':10}tokens/s   seconds a round")
    for name, values in seconds.items():
        print(f"{name:10}{rates[name]:8.0f}   {' '.join(f'{value:.2f}' for value in values)}")
    print(f"overhead, median of {ROUNDS} pairs: {100 * (median(pairs) - 1):.1f} %")


if __name__ == "__main__":
    main()
