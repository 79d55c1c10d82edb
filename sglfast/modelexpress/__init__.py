"""ModelExpress P2P metadata: a new worker finds a peer to load its weights from. Needs the extra `sglfast[modelexpress]`.

A floor of its own: it imports nothing of edge, index, control, sim and load.
"""
