"""The method in one file: drafting, verification, guidance and test-time training, written out step by step.

One sequence, no caches: slow and short, to be read beside the DFlash paper. The package computes the same with caches
and in batches (`tests/unit/test_method_file.py` compares every step). `python docs/method.py` runs it.
Letters: S tokens of a sequence, V vocabulary, H hidden size, F tapped layers, N anchors, K block size, D head width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgd_lightning import load_pair
from dgd_lightning.lab.rows import eval_rows


class Models(NamedTuple):
    target: Any  # a transformers causal LM, frozen
    weights: dict[str, Tensor]  # of the draft, by the names of its checkpoint
    config: Any  # of the draft: sizes, mask token, which layers of the target it reads

    def adapted(self, lora: dict[str, tuple[Tensor, Tensor]]) -> "Models":
        """LoRA: W + B·A in place of some of the draft's weights W; A is [r, in], B [out, r]."""
        return self._replace(weights=self.weights | {n: self.weights[n] + b @ a for n, (a, b) in lora.items()})


class Reading(NamedTuple):
    logits: Tensor  # [S, V]; those at position p are for the token at p + 1
    features: Tensor  # [S, F·H]; outputs of the tapped layers, side by side


@torch.no_grad()
def read(models: Models, ids: Tensor) -> Reading:
    """A forward of the target over ids [S]: the prefill, and each verification."""
    out = models.target(ids[None], output_hidden_states=True, use_cache=False)
    tapped = [out.hidden_states[layer + 1][0] for layer in models.config.target_layer_ids]
    return Reading(out.logits[0], torch.cat(tapped, dim=-1))


def draft_logits(models: Models, ids: Tensor, features: Tensor, anchors: Tensor) -> Tensor:
    """Logits [N, K − 1, V] of slots 1 … K − 1 of a block at each of the anchors [N].

    A block anchored at p is [token at p, mask, …, mask], and its slot j predicts the token at p + j. In every layer it
    attends to the target's features strictly before p and to all of itself. Embedding and head are the target's own.
    """
    c, w, num = models.config, models.weights, len(anchors)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], c.rms_norm_eps)

    def rotated(name: str, x: Tensor, positions: Tensor) -> Tensor:  # [N, S, H] -> [N, heads, S, D]
        x = norm(f"{name}_norm", linear(name, x).unflatten(-1, (-1, c.head_dim))).transpose(1, 2)
        angles = positions[:, None, :, None] * frequencies  # [N, 1, S, D]
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)

    frequencies = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim).repeat(2)  # [D], rotary
    slots, before = torch.arange(c.block_size), torch.arange(len(features))
    own = anchors[:, None] + slots  # [N, K], positions of the blocks
    keys = torch.cat([before.expand(num, -1), own], dim=1)  # [N, S + K], positions of context and block
    seen = torch.cat([before < anchors[:, None], torch.ones_like(own, dtype=torch.bool)], dim=1)[:, None, None]
    context = norm("hidden_norm", F.linear(features, w["fc.weight"])).expand(num, -1, -1)  # [N, S, H]
    block = torch.where(slots > 0, c.mask_token_id, ids[anchors][:, None])
    x = models.target.get_input_embeddings()(block)  # [N, K, H]
    for layer in (f"layers.{i}" for i in range(c.num_layers)):
        name, h = f"{layer}.self_attn", norm(f"{layer}.input_layernorm", x)
        both = torch.cat([context, h], dim=1)  # [N, S + K, H]
        q, k = rotated(f"{name}.q", h, own), rotated(f"{name}.k", both, keys)
        v = linear(f"{name}.v", both).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)  # [N, heads, K, D]
        x = x + linear(f"{name}.o", mixed.transpose(1, 2).flatten(2))
        name, h = f"{layer}.mlp", norm(f"{layer}.post_attention_layernorm", x)
        x = x + linear(f"{name}.down", F.silu(linear(f"{name}.gate", h)) * linear(f"{name}.up", h))
    return models.target.get_output_embeddings()(norm("norm", x)[:, 1:])


def guided_logits(models: Models, ids: Tensor, reading: Reading, positions: Tensor, beta: float) -> Tensor:
    """(1 − β)·target + β·draft, [Q, V]; the draft's logits at a position are slot 1 of the block anchored there."""
    draft = draft_logits(models, ids, reading.features, positions)[:, 0] if beta else 0
    return (1 - beta) * reading.logits[positions] + beta * draft


def verify(proposal: Tensor, chosen: Tensor) -> Tensor:
    """Greedy: the proposal [K − 1] as far as it agrees with what would be chosen [K], and one chosen token more."""
    return chosen[: int((proposal == chosen[:-1]).long().cumprod(0).sum()) + 1]


def verify_sampled(proposal: Tensor, q: Tensor, p: Tensor, uniform: Tensor) -> Tensor:
    """T > 0: a proposal drawn from q [K − 1, V] gives tokens as if drawn from p [K, V] (Leviathan et al. 2023)."""
    ratio = (p[:-1] / q).gather(1, proposal[:, None])[:, 0]  # accepted with probability min(1, p/q)
    count = int((uniform[0, :-1] < ratio).long().cumprod(0).sum())
    rest = (p[count] - q[count]).clamp(min=0) if count < len(proposal) else p[count]
    last = torch.searchsorted(rest.cumsum(0) / rest.sum(), uniform[1, count : count + 1], right=True)
    return torch.cat([proposal[:count], last])


@torch.no_grad()
def decode(models: Models, prompt: Tensor, count: int, beta: float = 0.0) -> tuple[Tensor, list[int]]:
    """New tokens, greedy, and how many each verification committed. With β = 0 they are those of the target alone."""
    reading, lengths = read(models, prompt), list[int]()
    ids = torch.cat([prompt, guided_logits(models, prompt, reading, torch.tensor([len(prompt) - 1]), beta).argmax(-1)])
    while (left := len(prompt) + count - len(ids)) > 0:
        anchor = len(ids) - 1  # position of the last token, which the target has not read yet
        proposal = draft_logits(models, ids, reading.features[:anchor], torch.tensor([anchor]))[0].argmax(-1)
        reading = read(models, longer := torch.cat([ids, proposal]))
        chosen = guided_logits(models, longer, reading, torch.arange(anchor, len(longer)), beta).argmax(-1)
        tokens = verify(proposal, chosen)[:left]
        ids, lengths = torch.cat([ids, tokens]), [*lengths, len(tokens)]
    return ids[len(prompt) :], lengths


def adapt(models: Models, ids: Tensor, lora: dict, steps: list[Tensor], lr: float, gamma: float) -> list[float]:
    """Fit A and B to a context: a step of AdamW for blocks at each of the given anchors [N]. Returns the losses."""
    reading, losses, slots = read(models, ids), list[float](), torch.arange(1, models.config.block_size)
    optimizer = torch.optim.AdamW([w.requires_grad_() for pair in lora.values() for w in pair], lr, weight_decay=0.0)
    for anchors in steps:
        where = anchors[:, None] + slots  # [N, K − 1]
        p = reading.logits[where.clamp(max=len(ids) - 1) - 1].softmax(-1)  # [N, K − 1, V]
        log_q = draft_logits(models.adapted(lora), ids, reading.features, anchors).log_softmax(-1)
        weights = torch.exp(-(slots - 1).to(p) / gamma) * (where < len(ids))
        loss = ((torch.xlogy(p, p) - p * log_q).sum(-1) * weights).sum() / weights.sum()  # KL(target ‖ draft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a CPU, models this small are many times slower on several threads
    pair = load_pair("lab", "lab")  # the bundled one, of 1.3 million parameters
    models = Models(pair.target.model, dict(pair.draft.state_dict()), pair.draft.config)
    trained = ("fc.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
    shapes = {name: w.shape for name, w in models.weights.items() if name.endswith(trained)}
    for family in ("simulation", "ledger"):  # a kind of text that the draft was trained on, and one that is new to it
        chat = eval_rows(1, families=[family])[0]["messages"]
        prompt = torch.tensor(pair.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        lora = {name: (F.normalize(torch.randn(8, i)), torch.zeros(o, 8)) for name, (o, i) in shapes.items()}
        steps = [1 + torch.randperm(len(prompt) - 2)[:16] for _ in range(20)]
        losses = adapt(models, prompt, lora, steps, lr=1e-2, gamma=4.0)
        print(f"{family}: loss {losses[0]:.2f} → {losses[-1]:.2f} in 20 steps of adaptation to {len(prompt)} tokens")
        runs = {"speculative": (models, 0.0), "adapted": (models.adapted(lora), 0.0), "guided": (models, 0.3)}
        for name, (used, beta) in runs.items():
            tokens, lengths = decode(used, prompt, 40, beta)
            print(f"  {name}, 40 tokens in {len(lengths)} verifications: {pair.tokenizer.decode(tokens)!r}")
