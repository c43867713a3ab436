"""Test-time training: LoRA on the draft, fitted to one context from the context's own prefill."""
