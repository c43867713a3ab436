"""Peak memory of a prefill: tapped layers streamed in chunks, against all hidden states of one forward.

On CUDA the allocator's peak above the weights; on CPU the growth of the process's peak resident size, for which each
arm runs in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from dgd_lightning.pair import Pair

ARMS = ("tapped", "all_hidden_states")


@torch.no_grad()
def read(pair: Pair, ids: torch.Tensor, arm: str) -> None:
    """Prefill ids [1, S] and leave the draft's context behind, one way or the other."""
    assert pair.draft is not None
    layer_ids, length = pair.draft.config.target_layer_ids, ids.shape[1]
    contexts = pair.draft.new_cache(1, length)
    if arm == "tapped":
        cache = pair.target.new_cache(1, length)
        pair.target.prefill(
            ids, [length], cache, layer_ids=layer_ids, on_features=lambda f, p: pair.draft.extend(contexts, f, p)
        )
        return
    output = pair.target.model(ids, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    features = torch.cat([output.hidden_states[i + 1] for i in layer_ids], dim=-1)  # [1, S, F·H]
    pair.draft.extend(contexts, features, torch.arange(length, device=ids.device)[None])


def peak_bytes(pair: Pair, arm: str, length: int) -> int:
    """Bytes by which this process's peak grows in one prefill of ``length`` tokens."""
    ids = torch.randint(pair.target.vocab_size, (1, length), device=pair.target.device)
    read(pair, ids[:, :64], arm)  # libraries allocate their own on first use
    if pair.target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        read(pair, ids, arm)
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(pair, ids, arm)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def compare(arguments: list[str], length: int) -> dict[str, int]:
    """Each arm's peak, measured in a process of its own; ``arguments`` choose the pair as for ``decode.py``."""
    script = str(Path(__file__).with_name("decode.py"))
    peaks = {}
    for arm in ARMS:
        command = [sys.executable, script, *arguments, "--memory-arm", arm, "--memory-length", str(length)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[arm] = json.loads(out.splitlines()[-1])["peak_bytes"]
    return peaks
