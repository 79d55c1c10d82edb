"""Simulated workers: one process plays N SGLang servers, HTTP and KV events, without a GPU.

Runs in: the process of `sglfast sim`, or inside a test. Life of a request:

    bytes --http.Connection--> Request --worker.SimWorker--> route
    inference: requests.py (body -> what is asked), prompts.py (-> token ids, block keys), then one rank's
               engine.Engine (waiting queue, chunked prefill, decode, radix cache) in simulated time, which
               pacer.Pacer turns into real time; every step: events.EventLog -> publisher.KvPublisher (ZMQ),
               answers.py -> bytes -> Connection
    several prompts, or several answers to one: batches.py splits and joins
    prefill and decode apart: jobs.py (which half of a request a worker does), rooms.py (how the prompt gets from one to the other)
    the rest:  introspect.py (what a worker tells about itself), fault.py and worker.py (how it misbehaves)

Contract: what a client or a subscriber can observe is as sglang 0.5.23 does it (spec/kv_events.md, golden
    engine_semantics_0.5.23.json); what costs time costs it by the rates of the settings, whatever the machine's speed.
    One event loop, nothing blocks it; all state of a worker is in its SimWorker.
"""
