"""What edge, sim and load share: request body -> text -> token ids -> block keys, each step exactly as the engine does it.

Runs in: shard, simulator, load generator. Life of a prompt:

    body --keys.PromptReader.text_of--> PromptText     chat.py brings the body into the form that SGLang gives its template,
                                                       template.py renders it as Hugging Face transformers does
    PromptText --tokens_of--> token ids                tokenizer.py
    token ids --keys_of--> block keys                  the compiled module _blockhash

That is the plain way, and the measure of the others: lazy.py goes only as far as somebody owns the blocks, raw.py does so from a chat's
bytes and what was seen of them.

Contract: a difference of one token from the engine costs all overlap after it, silently, so every rule here names its
    source. The reference is SGLang 0.5.23 with transformers 5. What cannot be known (media, sessions) is said, not guessed.
    Nothing here blocks on I/O after loading, and what a client sent can only cause PromptError.
"""
