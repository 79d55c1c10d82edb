"""What people test pools with: trace replay, comparison of policies in tables and plots, and the demo.

Runs in: `sglfast replay` and `sglfast demo`, each one process that sends real HTTP and, unless told otherwise, starts simulated
    workers and a router of its own. Nothing here is ever loaded by a serving process.

From file to file: trace (what is asked, and when) -> text (the bytes of each prompt) -> openloop (sends them on time, over client)
    -> report (numbers and tables) -> plot. stack owns the child processes; replay and demo are the two commands.
"""
