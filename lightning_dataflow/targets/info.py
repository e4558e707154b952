"""What a target model's folder says about it, without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.fingerprint import PREFIX, early_fingerprint, model_fingerprint, tokenizer_fingerprint
from lightning_dataflow.contracts.foreign import first_line

_trusted: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """Sizes of a target and fingerprints of its weights and tokenizer.

    Attributes:
        rope_theta: base of the rotary embedding; drafts use the target's.
        model_version, tokenizer_version: features carry them, so that a trainer notices features of another target.
    """

    path: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    model_version: str
    tokenizer_version: str

    def has_version(self, version: str) -> bool:
        """Whether features or a checkpoint that carry `version`, perhaps from an earlier release, are this target's."""
        is_early = not version.startswith(PREFIX)
        return version == (early_fingerprint(Path(self.path)) if is_early else self.model_version)


def trust_remote_code(path: str | Path) -> None:
    """Let transformers run the code in a target's folder, in this process.

    It is the process that trusts: no checkpoint, card or setting of a module can ask for it.
    """
    _trusted.add(Path(path).resolve())


def loading(path: str | Path) -> dict[str, bool]:
    """Arguments of every `from_pretrained` of a target, its config or its tokenizer."""
    return {"trust_remote_code": Path(path).resolve() in _trusted}


def read_target_info(path: str | Path) -> TargetInfo:
    """Read `config.json` and fingerprint a target's folder. Raises UserError when it is not one."""
    folder = Path(path)
    _check_folder(folder)
    config = _read_config(folder).get_text_config()
    _check_logits(config, folder)
    heads = config.num_attention_heads
    return TargetInfo(
        path=str(folder),
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-5,
        rope_theta=_rope_theta(config),
        max_position_embeddings=getattr(config, "max_position_embeddings", None) or 2048,
        model_version=model_fingerprint(folder),
        tokenizer_version=tokenizer_fingerprint(folder),
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `path`. Raises UserError when there is none."""
    _check_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **loading(path))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot load a tokenizer from {path}: {_reason(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {path} is not a fast one, character offsets are needed: add a tokenizer.json")
    return tokenizer


def read_eos_token_ids(path: str | Path) -> tuple[int, ...]:
    """Tokens that end a generation of the target in `path`, as transformers reads them."""
    _check_folder(Path(path))
    if (Path(path) / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    else:
        ids = GenerationConfig.from_model_config(_read_config(Path(path))).eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def tensor_names(path: str | Path) -> tuple[list[str], list[str]]:
    """Names that the token embedding and the head may have in a target's files, by building it without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_read_config(Path(path)), **loading(path))

    def names(wanted: Any) -> list[str]:
        return [f"{name}.weight" for name, module in model.named_modules() if module is wanted]

    return names(model.get_input_embeddings()), names(model.get_output_embeddings())


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **loading(folder))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot read {folder}/config.json: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return first_line(error)
    return (
        "it needs code of its own, which is not run (target.trust_remote_code=false): choose a target that transformers "
        "supports by itself"
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"no target model in {folder} (config.json is missing): set target.path to a Hugging Face folder")


def _check_logits(config: Any, folder: Path) -> None:
    """Drafts are trained on head · h; a target that changes these products afterwards has another distribution."""
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1.0), ("logits_scaling", 1.0)):
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise UserError(f"{folder}: {name}={value} is not supported, logits must be the head times the hidden state")


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
