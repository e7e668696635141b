"""A portable CPU platform for SGLang: plain torch, no AMX, no CPU build of sgl-kernel."""
