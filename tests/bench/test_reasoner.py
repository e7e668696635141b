"""The bundled reasoner solves what it was trained on with the full cache."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lethe_bench.tasks import TRAINED

ROOT = Path(__file__).parents[2]


def test_the_shipped_weights_solve_95_percent_of_every_trained_family():
    command = [sys.executable, "models/reasoner/train.py", "--check", "--problems", "20", "--families", *TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = dict(re.findall(r"^(\w+) +(\d+) / 20 ", done.stdout, re.MULTILINE))
    assert set(found) == set(TRAINED) and min(map(int, found.values())) >= 0.95 * 20, done.stdout


def test_the_model_is_small_and_speaks_the_tasks_alphabet():
    from transformers import AutoConfig, AutoTokenizer

    from lethe_bench.tasks import END_THINK, FAMILIES, THINK, problem, tokens_of

    model = ROOT / "models" / "reasoner"
    config, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    assert sum(file.stat().st_size for file in model.iterdir()) <= 20e6
    assert config.num_hidden_layers >= 6 and config.num_key_value_heads >= 2 and config.head_dim == 64
    assert config.max_position_embeddings >= 4096
    for family in FAMILIES:
        item = problem(family, "unit", 0)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": item.question}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *tokens_of(item.question), THINK]
        reply = item.thinking + END_THINK + item.answer
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens_of(reply) and tokenizer.decode(ids) == reply
