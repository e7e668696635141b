"""Reasoning offline, with eviction: one prompt, its answer, what its KV cache held, and another budget for the next.

python examples/offline_engine.py [MODEL]
"""

import sys

import sglang as sgl

MODEL = sys.argv[1] if len(sys.argv) > 1 else "models/reasoner-dev"
PROMPT = "<bos>i>e;t>o;e>i;o>t;?t60|"  # a walk on a graph: 60 steps from t; the bundled model writes every step

# Engine starts processes that import this file again; without the guard each of them would start an engine too.
if __name__ == "__main__":
    engine = sgl.Engine(model_path=MODEL, kv_evict="lethe", kv_evict_config="cpu-demo", kv_evict_budget=64)
    print(engine.generate(PROMPT, {"temperature": 0, "max_new_tokens": 300})["text"])
    request = engine.kv_evict_requests(after=0)["requests"][-1]
    print(f"{request['rounds']} rounds; {request['held_peak']} tokens held at most, {request['stock_peak']} by stock")
    print(engine.kv_evict_reconfigure({"budget": {"tokens": 96}})["changed"])  # this engine, from now on
    assert engine.kv_evict_configuration()["budget"]["tokens"] == 96
    engine.shutdown()
