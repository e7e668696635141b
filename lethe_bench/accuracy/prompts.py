"""Prompts as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Prompts:
    """The model's tokenizer and chat template.

    Parameters
    ----------
    model_path
        Directory of the model.
    variables
        What the chat template takes besides the messages.

    Attributes
    ----------
    tokenizer
        Of the transformers library.
    end
        Text of the token that ends a reply.
    """

    def __init__(self, model_path: str, variables: dict[str, Any] | None = None) -> None:
        from transformers import AutoTokenizer  # slow to import: only when something is asked

        self.variables = variables or {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_path, local_files_only=Path(model_path).is_dir())
        self.end = str(self.tokenizer.eos_token or "")

    def encode(self, question: str) -> list[int]:
        """Return a question's prompt as token ids, with the template's special tokens and no others."""
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(question)["input_ids"])
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False, **self.variables
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def length(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
