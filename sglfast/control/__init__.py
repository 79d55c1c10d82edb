"""Control: the process that `sglfast serve` is. It starts and watches the others, knows the workers, and serves administration.

main (the life of the program) > supervisor > children (our processes); pool_watch > health, introspect > fetch (the workers), workers
(their table in shared memory); admin > metrics; listen (the sockets that shards inherit).
"""
