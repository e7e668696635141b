"""Measurements of real servers, over HTTP and subprocesses only: throughput and memory against stock SGLang."""
