"""The routes of SGLang's HTTP server: those that generate, with a request of each, and those that do not."""

from __future__ import annotations

from conftest import MODEL
from problems import prompt, walk

PROBLEM, ANSWER = walk(3, steps=44)
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": PROBLEM}]}
OLLAMA = {"model": "m", "stream": False, "options": {"temperature": 0, "num_predict": 80}}
PARAMS = {"temperature": 0, "max_new_tokens": 80}
ROUTES = {
    "/generate": {"text": prompt(PROBLEM), "sampling_params": PARAMS},
    "/vertex_generate": {"instances": [{"text": prompt(PROBLEM)}], "parameters": {"sampling_params": PARAMS}},
    "/v1/completions": {"model": "m", "prompt": prompt(PROBLEM), "temperature": 0, "max_tokens": 80},
    "/v1/chat/completions": {**MESSAGES, "temperature": 0, "max_tokens": 80},
    "/invocations": {**MESSAGES, "temperature": 0, "max_tokens": 80},
    "/v1/responses": {"model": str(MODEL), "input": PROBLEM, "temperature": 0, "max_output_tokens": 80},
    "/v1/messages": {**MESSAGES, "temperature": 0, "max_tokens": 80},
    "/api/chat": {**MESSAGES, **OLLAMA},
    "/api/generate": {"prompt": prompt(PROBLEM), **OLLAMA},
}
"""Every route that generates, with a request of 80 tokens: enough for a round."""
PLACES = {"/generate": ("sampling_params",), "/vertex_generate": ("parameters", "sampling_params")}
"""Where a route's body has ``custom_params``, if not at its top."""
NO_DECODING = {
    *("/encode", "/classify", "/v1/embeddings", "/v1/classify", "/v1/score", "/v1/decisions", "/v1/rerank"),
    *("/v1/systemone", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/messages/count_tokens"),
    *("/parse_function_call", "/separate_reasoning", "/api/show", "/v1/audio/transcriptions"),
    *("/open_session", "/close_session", "/v1/responses/{response_id}/cancel"),
}
"""Routes that decode nothing on a model that eviction takes."""
