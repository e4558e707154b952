"""References as EAGLE3 makes them, of features that are nowhere."""

import secrets
from functools import lru_cache

from lightning_dataflow.contracts import CaptureSpec, FeatureSpec, SampleOrigin, SampleRef

HIDDEN = 2048
CAPTURE = CaptureSpec(layer_ids=(1, 13, 24), norm="post", hidden_size=HIDDEN)


@lru_cache
def features(num_tokens: int) -> dict[str, FeatureSpec]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "input_ids": ((num_tokens,), "int64"),
        "loss_mask": ((num_tokens,), "uint8"),
        "aux_hidden_states": ((num_tokens, 3 * HIDDEN), "bfloat16"),
        "last_hidden_state": ((num_tokens, HIDDEN), "bfloat16"),
    }
    return {
        name: FeatureSpec(
            name=name, shape=shape, dtype=dtype, target_repr="hidden_state" if name == "last_hidden_state" else None
        )
        for name, (shape, dtype) in shapes.items()
    }


def num_tokens(seq: int) -> int:
    return 128 + seq * 37 % 1920


def num_bytes(seq: int) -> int:
    return num_tokens(seq) * (2 * 4 * HIDDEN + 8 + 1)


def reference(seq: int, attempt: int) -> SampleRef:
    task = f"{seq:08d}-p0"
    origin = SampleOrigin(
        sample_id=f"bench:{task}",
        run_id="bench",
        source_task_id=task,
        source_id=f"{seq:08d}",
        capture=CAPTURE,
        target_model_version="0123456789abcdef",
        tokenizer_version="fedcba9876543210",
        num_tokens=num_tokens(seq),
        attempt=attempt,
        metadata={"pass": 0},
    )
    return SampleRef(
        origin=origin,
        uri="mooncake://bench",
        generation=f"{attempt}-{secrets.token_hex(8)}",
        features=features(origin.num_tokens),
        num_bytes=num_bytes(seq),
    )
