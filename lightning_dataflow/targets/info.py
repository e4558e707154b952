"""What a target model's folder says about it, without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from lightning_dataflow.contracts import UserError
from lightning_dataflow.contracts.fingerprint import PREFIX, early_fingerprint, model_fingerprint, tokenizer_fingerprint
from lightning_dataflow.contracts.foreign import first_line
from lightning_dataflow.targets.files import find_tensors
from lightning_dataflow.targets.logits import IDENTITY, LogitsTransform, read_logits_transform
from lightning_dataflow.targets.rope import Rope, read_rope
from lightning_dataflow.targets.sizes import check_count, check_eps, check_theta

_trusted: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """Sizes of a target and fingerprints of its weights and tokenizer.

    Attributes:
        rope_theta, rope_scaling: of the rotary embedding; drafts use the target's (see `read_rope`).
        logits: what becomes of the products of head and hidden state; without a bias, which stands in the weights.
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
    rope_scaling: Rope | None = None
    logits: LogitsTransform = IDENTITY

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
    try:
        config = _read_config(folder).get_text_config(decoder=True)
        sizes = _sizes(config, folder / "config.json")
    except UserError:
        raise
    except Exception as error:  # a config.json can make transformers raise almost anything
        raise UserError(f"cannot read {folder}/config.json: {reason(error)}") from error
    find_tensors(folder)  # refuses folders without weights, and damaged files
    return TargetInfo(
        path=str(folder),
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        logits=read_logits_transform(config, f"{folder}/config.json"),
        model_version=model_fingerprint(folder),
        tokenizer_version=tokenizer_fingerprint(folder),
        **sizes,
    )


def _sizes(config: Any, where: Path) -> dict[str, Any]:
    """The sizes in TargetInfo, all plausible."""
    width, heads = (check_count(getattr(config, name), name, where) for name in ("hidden_size", "num_attention_heads"))
    given = {
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * width,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or width // heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 2048,
    }
    theta, scaling = read_rope(config)
    return {name: check_count(value, name, where) for name, value in given.items()} | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_layers": check_count(config.num_hidden_layers, "num_hidden_layers", where),
        "rms_norm_eps": check_eps(getattr(config, "rms_norm_eps", None) or 1e-5, where),
        "rope_theta": check_theta(theta, where),
        "rope_scaling": scaling,
    }


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `path`. Raises UserError when there is none."""
    _check_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **loading(path))
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"cannot load a tokenizer from {path}: {reason(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {path} is not a fast one, character offsets are needed: add a tokenizer.json")
    return tokenizer


def read_eos_token_ids(path: str | Path) -> tuple[int, ...]:
    """Tokens that end a generation of the target in `path`, as transformers reads them. Raises UserError if it cannot."""
    folder = Path(path)
    _check_folder(folder)
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # a damaged file can make transformers raise almost anything
            raise UserError(f"cannot read {file}: {reason(error)}") from error
    else:
        file, config = folder / "config.json", GenerationConfig.from_model_config(_read_config(folder))
    given = config.eos_token_id
    ids = [] if given is None else [given] if isinstance(given, int) else given
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise UserError(f"cannot read {file}: eos_token_id={str(given)[:80]} is neither a token id nor a list of them")
    return tuple(ids)


def auto_class(path: str | Path) -> Any:
    """The auto class of transformers that loads the language model of `path`, a multimodal one's with the rest of it.
    Raises UserError when there is none."""
    config = _read_config(Path(path))
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise UserError(f"{path} holds a {config.model_type} model, which is not a causal language model: name another target")


def tensor_names(path: str | Path) -> tuple[list[str], list[str]]:
    """Names that the token embedding and the head have in a target's modules, by building it without memory."""
    with torch.device("meta"):
        model = auto_class(path).from_config(_read_config(Path(path)), **loading(path))

    def names(wanted: Any) -> list[str]:
        return [f"{name}.weight" for name, module in model.named_modules() if module is wanted]

    return names(model.get_input_embeddings()), names(model.get_output_embeddings())


def _read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **loading(folder))
    except Exception as error:  # a config.json can make transformers raise almost anything
        raise UserError(f"cannot read {folder}/config.json: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why transformers cannot load something, in one line that advises nothing unsafe."""
    if "trust_remote_code" not in str(error):
        return first_line(error)
    return (
        "it needs code of its own, which is not run (target.trust_remote_code=false): choose a target that transformers "
        "supports by itself"
    )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"no target model in {folder} (config.json is missing): set target.path to a Hugging Face folder")
