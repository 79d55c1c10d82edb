"""Formats of the engines, both directions and no I/O: KV event batches, their ZMQ frames, `/server_info` and its kin.

Runs in: every process that needs one. Contract: what comes from outside is never trusted (typed decoding, caps, one error
    class per border); what we build is byte for byte what SGLang builds. Facts: spec/kv_events.md.
"""
