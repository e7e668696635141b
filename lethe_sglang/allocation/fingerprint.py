"""Which model a profile is of: two processes that serve one model get one fingerprint, two fine-tunes get two."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_IDENTITY = {
    "architecture": "architecture",
    "layers": "layers",
    "heads": "query heads",
    "kv_heads": "KV heads",
    "head_dim": "head width",
    "config_hash": "hash of the model's configuration",
    "weights": "weights",
}
_NUMERICS = {"dtype": "dtype", "quantization": "quantization"}

_VOLATILE = (
    *("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("context_len", "encoder_only", "language_only"),  # SGLang notes these arguments of the server there
)
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class Part(BaseModel):
    """Base of the parts of a profile: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelFingerprint(Part):
    """Which model a profile is of.

    Attributes
    ----------
    name
        For people only; never compared.
    config_hash
        Of the model's configuration without what varies from copy to copy and from server to server.
    weights
        ``sampled:`` and a hash of samples of the weight files, or ``revision:`` and the hub's commit. Only values of
        one kind are compared; empty is not known.
    layers, heads, kv_heads, head_dim
        Attention layers; query and KV heads of the whole model, not of one rank.
    dtype, quantization
        How the model ran; a profile may be used under another.
    """

    name: str
    architecture: str
    config_hash: str
    weights: str = ""
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    dtype: str
    quantization: str | None = None

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Say in which respects ``other`` (the server's model) is another model."""
        fields = {k: text for k, text in _IDENTITY.items() if k != "weights" or self._comparable(other)}
        return self._compare(other, fields)

    def numeric_differences(self, other: ModelFingerprint) -> list[str]:
        """Say in which respects the same model runs otherwise under ``other``."""
        return self._compare(other, _NUMERICS)

    def _comparable(self, other: ModelFingerprint) -> bool:
        kinds = {self.weights.partition(":")[0], other.weights.partition(":")[0]}
        return len(kinds) == 1 and "" not in kinds

    def _compare(self, other: ModelFingerprint, fields: dict[str, str]) -> list[str]:
        pairs = ((text, getattr(self, name), getattr(other, name)) for name, text in fields.items())
        return [f"{text} {ours} against {theirs}" for text, ours, theirs in pairs if ours != theirs]

    @property
    def key(self) -> str:
        """Hash of everything but ``name``."""
        return digest(self.model_dump(mode="json", exclude={"name"}))


def digest(content: Any) -> str:
    """Hash JSON-like content: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_of(model: Any, resolved: Any) -> ModelFingerprint:
    """Return a model's fingerprint; two processes with the same arguments get the same.

    Parameters
    ----------
    model
        SGLang's ``ModelConfig``.
    resolved
        A view of the resolved server arguments. Its dtype counts: the platform may have settled it after ``model``.
    """
    path = Path(model.model_path)
    commit = getattr(model.hf_config, "_commit_hash", None)
    return ModelFingerprint(
        name=path.resolve().name if path.is_dir() else str(model.model_path),
        architecture=str((model.hf_config.architectures or ["unknown"])[0]),
        config_hash=digest({k: v for k, v in model.hf_config.to_dict().items() if k not in _VOLATILE}),
        weights=sample_weights(path) if path.is_dir() else f"revision:{commit}" if commit else "",
        layers=int(model.num_attention_layers),
        heads=int(model.num_attention_heads),
        kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.head_dim),
        dtype=str(model.dtype if resolved.dtype == "auto" else resolved.dtype).removeprefix("torch."),
        quantization=model.quantization,
    )


def sample_weights(folder: Path) -> str:
    """Hash names, sizes and samples of the weight files: two fine-tunes of one model differ; no file is read whole."""
    found = hashlib.sha256()
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")]
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for i in range(_SAMPLES):
                data.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                found.update(data.read(_SAMPLE_BYTES))
    return f"sampled:{found.hexdigest()[:16]}" if files else ""
