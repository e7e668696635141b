"""The one-time pass: a model answers calibration prompts uncompressed and its layers' attention is measured."""
