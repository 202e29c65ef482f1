"""Vector quantisation: in-context Markov chains, byte-level language models, digits, memory."""
