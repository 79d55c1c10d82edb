"""The KV index: follows the event stream of every rank and writes who owns which block into the hash tree in shared memory.

Runs in: the index process. `stream` is one rank's sequence rules (pure), `rank` turns batches into tree writes, `subscriber` is the
    thread with the sockets of one rank, `main` the process: it follows the worker table and owns everything else.
"""
