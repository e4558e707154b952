"""Loads drafts with SGLang's own loader and runs them on plain attention. Runs in SGLang's environment, as a script.

    load_drafts.py TARGET FOLDER

FOLDER/NAME/draft is a draft, FOLDER/NAME/inputs.safetensors what to run it on; both `report.json` (which parameters were
written, which tensors used) and `outputs.safetensors` are written beside them.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_loader import get_model_loader
from sglang.srt.models.dflash import DFlashDraftModel
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from sglang.srt.speculative.domino_utils import domino_greedy_rollout
from torch import Tensor, nn
from torch.nn import functional as F


class PlainAttention(nn.Module):
    """In place of RadixAttention and its cache, with its window and kind; `context` holds keys and values before."""

    def __init__(self, radix: Any, context: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.radix, self.context = radix, context
        self.causal = radix.attn_type == AttentionType.DECODER
        self.window = radix.sliding_window_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor, forward_batch: Any) -> Tensor:
        """[n, heads · D] each."""
        if self.context is not None:
            key, value = (torch.cat(pair) for pair in zip(self.context, (key, value), strict=True))
        heads = [x.unflatten(-1, (-1, self.radix.head_dim)).transpose(0, 1) for x in (query, key, value)]
        position = torch.arange(len(key))
        own = position[-len(query) :, None]
        mask = (position <= own) if self.causal else torch.ones(len(query), len(key), dtype=torch.bool)
        if self.window is not None and self.window >= 0:
            mask = mask & (position >= own - self.window)
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.radix.scaling, enable_gqa=True)
        return out.transpose(0, 1).flatten(1)


def start(target: str, folder: Path) -> ServerArgs:
    """One rank, without an engine."""
    arguments = ServerArgs(model_path=target, device="cpu", attention_backend="torch_native", dtype="float32")
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{folder}/rendezvous", backend="gloo"
    )
    initialize_model_parallel(backend="gloo")
    return arguments


def load(arguments: ServerArgs, draft: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and what was written into it: parameters are NaN before, so a number tells that it was written."""
    config = ModelConfig.from_server_args(arguments, model_path=str(draft), is_draft_model=True)
    used: dict[str, int] = {}

    def watch(cls: type) -> None:
        original = cls.load_weights

        def load_weights(self: nn.Module, weights: Any) -> Any:
            def watched() -> Any:
                for name, tensor in weights:
                    before = num_unwritten(self)
                    yield name, tensor
                    used[name] = before - num_unwritten(self)

            for parameter in self.parameters():
                parameter.data.fill_(torch.nan)
            try:
                return original(self, watched())
            finally:
                cls.load_weights = original

        cls.load_weights = load_weights

    watch(LlamaForCausalLMEagle3 if "Eagle3" in config.hf_config.architectures[0] else DFlashDraftModel)
    loader = get_model_loader(LoadConfig(), config)
    model = loader.load_model(model_config=config, device_config=DeviceConfig("cpu"))
    report = {
        "class": type(model).__name__,
        "used": used,
        "untouched": [name for name, parameter in model.named_parameters() if parameter.isnan().any()],
    }
    return model, report


def num_unwritten(model: nn.Module) -> int:
    """Numbers that nobody has written."""
    return sum(int(parameter.isnan().sum()) for parameter in model.parameters())


@torch.no_grad()
def run_eagle3(model: nn.Module, inputs: dict[str, Tensor], report: dict[str, Any]) -> dict[str, Tensor]:
    """One causal pass; the embedding is lent as by SGLang's worker."""
    model.set_embed(nn.Parameter(inputs["embedding"], requires_grad=False))
    config = model.config
    report["untouched"] = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    report["layer_ids"] = config.eagle_config["eagle_aux_hidden_state_layer_ids"]
    if model.hot_token_id is not None:
        report["hot_token_id"] = model.hot_token_id.tolist()
    layer = model.model.layers[0]
    layer.self_attn.attn = PlainAttention(layer.self_attn.attn)
    batch = SimpleNamespace(
        mm_input_embeds=None,
        forward_mode=SimpleNamespace(is_extend=lambda: False),
        spec_info=SimpleNamespace(hidden_states=inputs["aux"]),
    )
    normed, (hidden,) = model.model(inputs["input_ids"], torch.arange(len(inputs["input_ids"])), batch)
    return {"hidden": hidden, "logits": F.linear(normed, model.lm_head.weight)[:, : config.draft_vocab_size]}


@torch.no_grad()
def run_block(model: nn.Module, inputs: dict[str, Tensor], report: dict[str, Any]) -> dict[str, Tensor]:
    """The block after the context, and the tokens that Domino drafts in it."""
    draft = parse_dflash_draft_config(draft_hf_config=model.config)
    report |= {
        "layer_ids": draft.target_layer_ids,
        "num_target_layers": draft.num_target_layers,
        "block_size": draft.block_size,
        "mask_token_id": draft.mask_token_id,
    }
    context, embedding = model.project_target_hidden(inputs["aux"]), inputs["embedding"]
    positions = torch.arange(len(context))
    for layer in model.layers:
        attention = layer.self_attn
        key, value = attention.kv_proj_only(context)
        key = attention.apply_k_rope(positions, attention.apply_k_norm(key))
        attention.attn = PlainAttention(attention.attn, (key, value))
    anchor = inputs["anchor"]
    block = torch.full((draft.block_size,), draft.mask_token_id)
    block[0] = anchor
    where = len(context) + torch.arange(draft.block_size)
    output = model(block, where, None, input_embeds=F.embedding(block, embedding))
    outputs = {"hidden": output.hidden_states}
    if draft.is_domino:
        table = nn.Embedding.from_pretrained(embedding)
        outputs["tokens"] = domino_greedy_rollout(
            draft_hidden=output.hidden_states[None],
            bonus_tokens=anchor[None],
            target_embedding=table,
            lm_head_weight=inputs["head"],
            prefix_gru=model.prefix_gru,
            embed_proj=model.embed_proj,
            vocab_size=len(embedding),
            shift_label=bool(model.shift_label),
            candidate_pool_size=0,
            in_cuda_graph=False,
        )[0]
    return outputs


def main(target: str, folder: Path) -> None:
    """All drafts, one after the other."""
    arguments = start(target, folder)
    for case in sorted(path for path in folder.iterdir() if (path / "draft").is_dir()):
        model, report = load(arguments, case / "draft")
        inputs = load_file(case / "inputs.safetensors")
        outputs = (run_eagle3 if hasattr(model, "lm_head") else run_block)(model, inputs, report)
        save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, case / "outputs.safetensors")
        (case / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
