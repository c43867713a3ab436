"""The bundled miniature: a synthetic context-learning world, its tokenizer and its trained pair."""
