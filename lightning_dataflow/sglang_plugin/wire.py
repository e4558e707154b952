"""The messages between clients and a capture server. Both sides validate them; they never hold tensors.

A request for capture is an ordinary `/generate` with token ids, `return_hidden_states`, one new token, and a string under
`PARAM` in `sampling_params.custom_params`, which SGLang hands through to its scheduler unread. The answer is one string in
`meta_info.hidden_states`.
"""

import array
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.validation import MAX_TOKENS, check_id

PARAM = "lightning_dataflow"
PROTOCOL = 3
HIDDEN_STATES = ("aux_hidden_states", "last_hidden_state")
SERVER_FILE = "LIGHTNING_DATAFLOW_SERVER_FILE"
"""The environment variable that names the server's settings; worker processes are spawned, so nothing else reaches them."""
OLDEST, BELOW = (0, 5, 23), (0, 6)
SUPPORTED = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
MAX_ANSWER_BYTES = 4096
CONVENTION = "DFLASH"
"""SGLang's name of the convention in which it counts layers as we do. No draft is loaded."""

ErrorKind = Literal["refused", "full", "store", "not_finite", "failed"]
"""`store`: the store is gone, which is not the prompt's fault. `not_finite`: the features hold NaN or infinity; the message
says where. `failed`: this prompt failed. Nothing was stored."""


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """A request to put the features of a prompt into a store.

    Attributes:
        store_id: of the run; the server's settings say in which Mooncake it is.
        loss_mask: 0 or 1 for each token.
        features: which of the hidden states to store.
        dry_run: answer what would be stored where, and store nothing.
        keeps_broken: store features with NaN or infinity too.
    """

    store_id: str
    sample_id: str
    loss_mask: Sequence[int]
    attempt: int = 0
    features: tuple[str, ...] = HIDDEN_STATES
    dry_run: bool = False
    keeps_broken: bool = False


def request_to_text(request: CaptureRequest) -> str:
    """One line of JSON. The mask becomes the lengths of alternating runs, starting with zeros."""
    runs = [(value, len(list(run))) for value, run in itertools.groupby(request.loss_mask)]
    data = {
        "protocol": PROTOCOL,
        "store": request.store_id,
        "sample": request.sample_id,
        "attempt": request.attempt,
        "features": request.features,
        "mask": [0] * (runs[:1] != [] and runs[0][0] == 1) + [length for _, length in runs],
        "dry_run": request.dry_run,
        "keeps_broken": request.keeps_broken,
    }
    return json.dumps(data, separators=(",", ":"))


def request_from_text(text: Any, num_tokens: int) -> CaptureRequest:
    """Raises UserError for anything malformed, or for a mask of another length than the prompt."""
    try:
        data = json.loads(text)
        if data["protocol"] != PROTOCOL:
            raise UserError(
                f"the client speaks protocol {data['protocol']}, the server {PROTOCOL}: install one release on both sides"
            )
        store_id, sample_id, attempt, runs = data["store"], data["sample"], data["attempt"], data["mask"]
        features, dry_run = tuple(data["features"]), bool(data["dry_run"])
        keeps_broken = bool(data["keeps_broken"])
        unknown = set(features) - set(HIDDEN_STATES)
        well_formed = _is_count(attempt, 10**9) and all(_is_count(run, MAX_TOKENS) for run in runs)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"not a capture request ({type(error).__name__}): use the client of this package") from error
    if not well_formed:
        raise UserError("attempt and mask of a capture request are whole numbers from 0: use the client of this package")
    check_id(store_id, "store")
    check_id(sample_id, "sample")
    if sum(runs) != num_tokens:
        raise UserError(f"the loss mask of {sample_id} has {sum(runs)} entries, the server read {num_tokens} tokens")
    if not features or unknown:
        raise UserError(f"features={list(features)} of {sample_id}: a server captures {' and '.join(HIDDEN_STATES)}")
    mask = tuple(index % 2 for index, run in enumerate(runs) for _ in range(run))
    return CaptureRequest(
        store_id=store_id,
        sample_id=sample_id,
        loss_mask=mask,
        attempt=attempt,
        features=features,
        dry_run=dry_run,
        keeps_broken=keeps_broken,
    )


def token_digest(token_ids: Sequence[int]) -> str:
    """Shows whether both sides mean the same prompt."""
    numbers = array.array("q", token_ids)
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers).hexdigest()[:32]


def check_version(version: str, whose: str = "") -> None:
    """Raise UserError, which begins with `whose`, unless this release of SGLang is supported."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
    if not OLDEST <= numbers < BELOW:
        raise UserError(f"{whose}SGLang {version} is not supported, capture needs sglang{SUPPORTED}: install one of those")


def flag_problems(args: Mapping[str, Any]) -> list[str]:
    """The flags that a server lacks for capture; `args` are its resolved settings."""
    layers = args.get("return_aux_hidden_state_layer_ids")
    captures = args.get("enable_return_aux_hidden_states") and args.get("aux_hidden_state_capture") == CONVENTION.lower()
    chunk = args.get("chunked_prefill_size")
    return [
        flag
        for flag, given in (
            (f"--enable-return-aux-hidden-states --speculative-algorithm {CONVENTION}", captures),
            ("--return-aux-hidden-state-layer-ids", bool(layers)),
            ("--disable-radix-cache", args.get("disable_radix_cache")),
            ("--chunked-prefill-size -1", chunk is None or chunk <= 0),
            ("--pp-size 1", args.get("pp_size", 1) == 1),
            ("--disable-prefill-cuda-graph", _prefill_graphs(args) == "disabled"),
        )
        if not given
    ]


def longest_prompt(args: Mapping[str, Any], who: str) -> int:
    """The longest prompt that a server takes, from its settings `args`. Raises UserError when they do not say."""
    limit: Any = args.get("max_req_input_len")
    if not _is_count(limit, 1 << 62) or limit < 2:
        raise UserError(f"{who} does not say what it takes (max_req_input_len={limit!r}): is it a stock SGLang server?")
    return limit - 1  # SGLang takes less than this


def server_command(
    model_path: str, layer_ids: Sequence[int], *, python: str = "python", module: str = "sglang.launch_server"
) -> list[str]:
    """How to start a capture server, without its address and sizes."""
    return [
        *(python, "-m", module, "--model-path", model_path),
        *("--enable-return-aux-hidden-states", "--speculative-algorithm", CONVENTION),
        *("--return-aux-hidden-state-layer-ids", *map(str, layer_ids)),
        *("--disable-radix-cache", "--chunked-prefill-size", "-1", "--disable-prefill-cuda-graph"),
    ]


def start_advice(model_path: str, layer_ids: Sequence[int]) -> str:
    """The command line, for messages."""
    return f"start it with: {SERVER_FILE}=server.json {shlex.join(server_command(model_path, layer_ids))}"


def _prefill_graphs(args: Mapping[str, Any]) -> Any:
    """A replayed graph writes to the memory of the batch before, which may still be copied to the host."""
    try:
        return args["cuda_graph_config"]["prefill"]["backend"]
    except (KeyError, TypeError):
        return None


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
