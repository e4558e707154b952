"""Runs inside SGLang: puts the features of a prompt from the model worker into the store, when a request asks for it.

The only module that imports sglang. There are two hooks. One stores a prompt's hidden states where SGLang would convert
them to lists of numbers. The other adds the last hidden states to the copies to the host: SGLang leaves them on the device,
where the next batch may overwrite them.
"""

import inspect
import json
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lightning_dataflow.contracts import (
    BrokenFeaturesError,
    CapacityError,
    CaptureSpec,
    SampleOrigin,
    UserError,
    ref_to_json,
)
from lightning_dataflow.contracts.fingerprint import model_fingerprint, tokenizer_fingerprint
from lightning_dataflow.sglang_plugin.settings import ServerStores, read_settings
from lightning_dataflow.sglang_plugin.wire import (
    MAX_ANSWER_BYTES,
    PARAM,
    CaptureRequest,
    ErrorKind,
    check_version,
    flag_problems,
    request_from_text,
    start_advice,
    token_digest,
)
from lightning_dataflow.stores import FeatureStore, StoreUnavailableError
from lightning_dataflow.stores.base import new_ref
from lightning_dataflow.stores.finite import check_features

APPEND = (
    "sglang.srt.managers.scheduler_components.batch_result_processor."
    "SchedulerBatchResultProcessor._append_prefill_hidden_states"
)
COPY = "sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu"
MAX_NEW_TOKENS = 1
KINDS: tuple[tuple[tuple[type[Exception], ...], ErrorKind], ...] = (
    ((BrokenFeaturesError,), "not_finite"),
    ((CapacityError,), "full"),
    ((UserError, PermissionError), "refused"),
    ((StoreUnavailableError,), "store"),
)

logger = logging.getLogger(__name__)


def register() -> None:
    """SGLang's entry point, called in each of its processes. Raises UserError when this release is not supported."""
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    check_version(sglang.__version__)
    moved = moved_hook_points()
    if moved:
        raise UserError(f"SGLang {sglang.__version__} has moved {'; '.join(moved)}: capture does not work with it")
    HookRegistry.register(APPEND, append_prefill_hidden_states, HookType.AROUND)
    HookRegistry.register(COPY, copy_to_cpu, HookType.AROUND)


def moved_hook_points() -> list[str]:
    """Names in SGLang that the hooks need and that are missing or changed."""
    import pkgutil

    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    problems = []
    for target, needed in (
        (APPEND, {"req", "logits_output", "hidden_state_offset", "capture_hidden_mode", "extend_input_len", "store"}),
        (COPY, {"return_hidden_states"}),
        ("sglang.srt.managers.utils._async_d2h", set()),
        ("sglang.srt.runtime_context.get_server_args", set()),
        ("sglang.srt.runtime_context.get_parallel", set()),
        ("sglang.srt.server_args.ServerArgs.resolved_dict", set()),
    ):
        owner, _, name = target.rpartition(".")
        try:
            function = getattr(pkgutil.resolve_name(owner), name)
        except (ImportError, AttributeError):
            problems.append(target)
            continue
        lacking = needed - set(inspect.signature(function).parameters)
        if lacking:
            problems.append(f"{target} (without {', '.join(sorted(lacking))})")
    for field in ("hidden_states", "last_hidden_states"):
        if field not in getattr(LogitsProcessorOutput, "__dataclass_fields__", {}):
            problems.append(f"LogitsProcessorOutput.{field}")
    return problems


def copy_to_cpu(original: Callable[..., Any], result: Any, *args: Any, **call: Any) -> Any:
    """Copy the last hidden states too: after the forward pass, on the stream and before the event of the other copies.

    Decode steps of requests that return hidden states are copied as well, one row a request: they look the same here.
    """
    from sglang.srt.managers.utils import _async_d2h

    output = result.logits_output
    wanted = call.get("return_hidden_states", True) and _writes()
    if wanted and output is not None and output.last_hidden_states is not None:
        output.last_hidden_states = _async_d2h(output.last_hidden_states)
    return original(result, *args, **call)


def append_prefill_hidden_states(original: Callable[..., int], processor: Any, **call: Any) -> int:
    """Store instead of converting, for a request that asks for capture; leave all others to SGLang."""
    req = call["req"]
    asked = req.sampling_params.custom_params
    wanted = isinstance(asked, dict) and PARAM in asked and req.return_hidden_states is True
    if not wanted or not call["capture_hidden_mode"].is_full():
        return original(processor, **call)
    offset = call["hidden_state_offset"]
    end = offset + call["extend_input_len"]
    if call.get("store", True) and _writes():
        req.hidden_states.append(_answer(asked[PARAM], req, call["logits_output"], range(offset, end), processor))
    return end


def _answer(text: Any, req: Any, output: Any, rows: range, processor: Any) -> str:
    """A reference, or an error. No exception may end the scheduler."""
    try:
        return json.dumps(_serve(text, req, output, rows, processor), separators=(",", ":"))
    except Exception as error:
        return error_to_text(error)


def error_to_text(error: Exception) -> str:
    """The answer that reports `error`, below MAX_ANSWER_BYTES."""
    kind = next((kind for errors, kind in KINDS if isinstance(error, errors)), "failed")
    if kind == "failed":
        logger.error("capture failed", exc_info=error)
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    while len(json.dumps(message)) > MAX_ANSWER_BYTES // 2:
        message = message[: len(message) * 3 // 4]
    return json.dumps({"error": kind, "message": message})


def _serve(text: Any, req: Any, output: Any, rows: range, processor: Any) -> dict[str, Any]:
    token_ids = list(req.origin_input_ids)
    request = request_from_text(text, len(token_ids))
    if req.sampling_params.n != 1:
        raise UserError(f"a prompt is captured once, not n={req.sampling_params.n} times: set n=1")
    server = _server(processor.model_config)
    with server.stores.use(request.store_id) as store:
        return _capture(server, store, request, req, output, rows)


def _capture(
    server: "Server", store: FeatureStore, request: CaptureRequest, req: Any, output: Any, rows: range
) -> dict[str, Any]:
    token_ids = list(req.origin_input_ids)
    if len(rows) != len(token_ids):
        raise RuntimeError(
            f"the server computed {len(rows)} of the {len(token_ids)} tokens of {request.sample_id} in this pass (prefix "
            "cache or chunked prefill)"
        )
    if req.sampling_params.max_new_tokens != MAX_NEW_TOKENS:
        raise UserError(f"a capture generates {MAX_NEW_TOKENS} token: set max_new_tokens={MAX_NEW_TOKENS}")
    computed = {"aux_hidden_states": output.hidden_states, "last_hidden_state": output.last_hidden_states}
    tensors = {
        "input_ids": torch.tensor(token_ids, dtype=torch.int64),
        "loss_mask": torch.tensor(request.loss_mask, dtype=torch.uint8),
        **{name: computed[name][rows.start : rows.stop] for name in request.features},
    }
    origin = server.origin(request, len(token_ids))
    if not request.keeps_broken:
        check_features(tensors, origin.capture.layer_ids)
    ref = new_ref(tensors, origin, store.uri) if request.dry_run else store.put(tensors, origin)
    return {"ref": ref_to_json(ref), "tokens": token_digest(token_ids)}


class Server:
    """The settings of this server, read once.

    Raises:
        UserError: a flag is missing, the settings file is wrong, or the model is not a local folder.
    """

    def __init__(self, model_config: Any):
        from sglang.srt.runtime_context import get_server_args

        flags = get_server_args().resolved_dict()
        folder = Path(flags["model_path"])
        layer_ids: Sequence[int] = flags.get("return_aux_hidden_state_layer_ids") or ()
        problems = flag_problems(flags)
        if problems:
            advice = start_advice(str(folder), layer_ids or ["LAYERS"])  # type: ignore[list-item]
            raise UserError(f"the server does not run with {', '.join(problems)}: {advice}")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--model-path {folder} is no folder on the server: capture needs a local one, to identify its weights"
            )
        self.stores: ServerStores = read_settings()
        self.capture = CaptureSpec(layer_ids=tuple(sorted(layer_ids)), norm="post", hidden_size=model_config.hidden_size)
        self.model_version, self.tokenizer_version = model_fingerprint(folder), tokenizer_fingerprint(folder)

    def origin(self, request: CaptureRequest, num_tokens: int) -> SampleOrigin:
        """What the server knows about a sample; the client replaces the names by its own."""
        return SampleOrigin(
            sample_id=request.sample_id,
            run_id=request.store_id,
            source_task_id=request.sample_id,
            source_id=request.sample_id,
            capture=self.capture,
            target_model_version=self.model_version,
            tokenizer_version=self.tokenizer_version,
            num_tokens=num_tokens,
            attempt=request.attempt,
        )


@cache
def _server(model_config: Any) -> Server:
    return Server(model_config)


def _writes() -> bool:
    """Whether this rank stores: all ranks of a tensor-parallel group hold the same features, and one answers."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
