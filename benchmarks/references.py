"""References as EAGLE3 makes them, of features that are nowhere."""

import random
from functools import cache

from lightning_dataflow.contracts import CaptureSpec, FeatureSpec, SampleOrigin, SampleRef

HIDDEN = 2048
CAPTURE = CaptureSpec(layer_ids=(1, 13, 24), norm="post", hidden_size=HIDDEN)


@cache
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


TEMPLATE = SampleRef(
    origin=SampleOrigin(
        sample_id="bench:0",
        run_id="bench",
        source_task_id="0",
        source_id="0",
        capture=CAPTURE,
        target_model_version="0123456789abcdef",
        tokenizer_version="fedcba9876543210",
        num_tokens=1,
        metadata={"pass": 0},
    ),
    uri="mooncake://bench",
    generation="0-0",
    features={},
    num_bytes=1,
)


def reference(seq: int, attempt: int) -> SampleRef:
    """Made without constructors: they are part of capturing, which is not what is measured."""
    source, tokens = f"{seq:08d}", num_tokens(seq)
    origin, ref = object.__new__(SampleOrigin), object.__new__(SampleRef)
    origin.__dict__.update(vars(TEMPLATE.origin))
    origin.__dict__.update(
        sample_id=f"bench:{source}-p0", source_task_id=f"{source}-p0", source_id=source, num_tokens=tokens, attempt=attempt
    )
    ref.__dict__.update(vars(TEMPLATE))
    ref.__dict__.update(
        origin=origin,
        generation=f"{attempt}-{random.getrandbits(64):016x}",
        features=features(tokens),
        num_bytes=num_bytes(seq),
    )
    return ref
