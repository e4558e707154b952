"""The two tensors that trainers need of the target: its token embedding and its head."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_dataflow.contracts import NotFiniteError, UserError
from lightning_dataflow.contracts.foreign import parse_json
from lightning_dataflow.data.finite import first_not_finite
from lightning_dataflow.targets.info import TargetInfo, tensor_names

EMBEDDING_NAMES = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Their names in a draft."""

HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")


class FrozenTarget:
    """Token embedding [V, H] and head [V, H] of a target, read from its safetensors without the rest.

    Deliberately not an `nn.Module`: its tensors are neither sharded, nor optimised, nor written into checkpoints. Tied
    embeddings share one tensor.
    """

    def __init__(self, embedding: Tensor, head: Tensor):
        self.embedding = embedding
        self.head = head

    @classmethod
    def of(cls, info: TargetInfo, dtype: torch.dtype) -> "FrozenTarget":
        """The tensors of a target, under whatever names its architecture gives them.

        Raises:
            UserError: the tensors cannot be found, or the head has a bias.
            NotFiniteError: the head holds NaN or infinity.
        """
        folder = Path(info.path)
        embeddings, heads = tensor_names(folder)
        embedding_names, head_names = (*EMBEDDING_NAMES, *embeddings), (*HEAD_NAMES, *heads)
        files = _files(folder)
        embedding, head = _read(files, embedding_names), _read(files, head_names)
        if embedding is None:
            raise UserError(
                f"no token embedding in the safetensors of {info.path}, looked for {', '.join(embedding_names)}"
            )
        if head is None and not info.tie_word_embeddings:
            raise UserError(f"no head in the safetensors of {folder}, looked for {', '.join(head_names)}")
        if any(name.replace(".weight", ".bias") in files for name in head_names):
            raise UserError(f"the head of {folder} has a bias, which is not supported")
        embedding = embedding.to(dtype)
        target = cls(embedding, embedding if head is None else head.to(dtype))
        if first_not_finite({"head": target.head}):
            raise NotFiniteError(f"the head of {folder} holds NaN or infinity: check the target's files")
        return target

    def to(self, device: torch.device) -> "FrozenTarget":
        """Move both tensors; tied ones stay tied."""
        tied = self.head is self.embedding
        self.embedding = self.embedding.to(device)
        self.head = self.embedding if tied else self.head.to(device)
        return self


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in parse_json(index.read_text(), str(index))["weight_map"].items()}
    return {name: file for file in sorted(folder.glob("*.safetensors")) for name in stored_names(file)}


def _read(files: Mapping[str, Path], names: Sequence[str]) -> Tensor | None:
    for name in names:
        if name in files:
            with safe_open(files[name], framework="pt") as file:
                return file.get_tensor(name).clone()
    return None


def stored_names(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file. Raises UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def same_tensor(stored: Tensor, ours: Tensor) -> bool:
    """Whether `stored` is `ours`, both rounded to the coarser of their dtypes."""
    coarser = min((stored.dtype, ours.dtype), key=lambda dtype: dtype.itemsize)
    return stored.shape == ours.shape and torch.equal(stored.to(ours.device, coarser), ours.to(coarser))
