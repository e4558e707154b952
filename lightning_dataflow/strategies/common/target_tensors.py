"""The two tensors that trainers need of the target: its token embedding and its head."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_dataflow.contracts import NotFiniteError, UserError
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
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        tied: bool = True,
        embedding_names: Sequence[str] = (),
        head_names: Sequence[str] = (),
    ) -> "FrozenTarget":
        """Read from a Hugging Face folder.

        Args:
            embedding_names, head_names: names to look for beside those of the common architectures.
            tied: the target's config allows the head to be the embedding, when the files hold none.

        Raises:
            UserError: the tensors cannot be found, or the head has a bias.
        """
        folder = Path(path)
        embedding_names, head_names = (*EMBEDDING_NAMES, *embedding_names), (*HEAD_NAMES, *head_names)
        embedding = _read(folder, embedding_names)
        if embedding is None:
            raise UserError(f"no token embedding in the safetensors of {folder}, looked for {', '.join(embedding_names)}")
        head = _read(folder, head_names)
        if head is None and not tied:
            raise UserError(f"no head in the safetensors of {folder}, looked for {', '.join(head_names)}")
        if _read(folder, [name.replace(".weight", ".bias") for name in head_names]) is not None:
            raise UserError(f"the head of {folder} has a bias, which is not supported")
        embedding = embedding.to(dtype)
        return cls(embedding, embedding if head is None else head.to(dtype))

    @classmethod
    def of(cls, info: TargetInfo, dtype: torch.dtype) -> "FrozenTarget":
        """The tensors of a target, under whatever names its architecture gives them.

        Raises NotFiniteError for a head with NaN or infinity.
        """
        embeddings, heads = tensor_names(info.path)
        target = cls.load(
            info.path, dtype=dtype, tied=info.tie_word_embeddings, embedding_names=embeddings, head_names=heads
        )
        if first_not_finite({"head": target.head}):
            raise NotFiniteError(f"the head of {info.path} holds NaN or infinity: check the target's files")
        return target

    def to(self, device: torch.device) -> "FrozenTarget":
        """Move both tensors; tied ones stay tied."""
        tied = self.head is self.embedding
        self.embedding = self.embedding.to(device)
        self.head = self.embedding if tied else self.head.to(device)
        return self


def _read(folder: Path, names: Sequence[str]) -> Tensor | None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
    else:
        files = {name: file.name for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    for name in names:
        if name in files:
            with safe_open(folder / files[name], framework="pt") as file:
                return file.get_tensor(name).clone()
    return None


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


def same_tensor(stored: Tensor, ours: Tensor) -> bool:
    """Whether `stored` is `ours`, both rounded to the coarser of their dtypes."""
    coarser = min((stored.dtype, ours.dtype), key=lambda dtype: dtype.itemsize)
    return stored.shape == ours.shape and torch.equal(stored.to(ours.device, coarser), ours.to(coarser))
