"""Verification inside other people's loops: one thin module an engine, none of which imports the engine.

`transformers` is the exception: it is a dependency of this package anyway. The others take and return plain tensors.
"""
