"""`dgd card DRAFT RUN`: a model card, README.md in the draft's folder, with τ and speed-up of a run with this draft.

Reads the draft's config.json and provenance, and the run's rows; no model is loaded. The licence and where the prompts
are from are for you to add. A README.md that is there is kept: move it away first.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dgd_lightning.analysis.arms import ArmStats, baseline_of, collect, speed_up
from dgd_lightning.commands.errors import command_parser, parsed
from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.metrics.clustered import shown
from dgd_lightning.modules.training import without_paths
from dgd_lightning.run_folder import read_predictions
from dgd_lightning.target.folder import read_json

CARD = """\
---
library_name: dgd-lightning
base_model: {target}
tags: [dflash, speculative-decoding]
---

# DFlash draft for {target}

A draft for speculative decoding ([DFlash](https://arxiv.org/abs/2602.06036)): {layers} layers that read the hidden
states of the target's layers {taps} (counted from 0), blocks of {block} tokens, mask token {mask}. Decoding with it
is lossless.

```python
from dgd_lightning import load_pair, speculative_generate
pair = load_pair("{target}", "FOLDER_OR_HUB_ID_OF_THIS_DRAFT")
```

## Tokens per verification

{table}

τ: tokens per verification, over all of them; speed-up: against decoding token by token on the same prompts, on
{hardware}. Neither carries over to other prompts or machines.

## Training

    {command}

with dgd-lightning {version}. To be added: where the prompts are from, and the licence.
"""


def main(argv: Sequence[str]) -> int:
    """Run `dgd card DRAFT RUN`."""
    parser = command_parser("card", __doc__, config=False)
    parser.add_argument("draft", type=str, help="the draft's folder")
    parser.add_argument("run", type=str, help="folder of a finished predict run with this draft")
    options = parsed(parser, argv[1:])
    draft, run = Path(options.draft), Path(options.run)
    config, model = DraftConfig.from_dict(read_json(draft / "config.json", "draft")), _settings(run)
    if (card := draft / "README.md").exists():
        raise InputError("draft", expected="no README.md yet", received=str(card), hint="move it away first")
    if not isinstance(model.get("draft"), str) or Path(model["draft"]).resolve() != draft.resolve():
        expected, received = f"a run that decoded with {draft}", f"one with {model.get('draft')}"
        raise InputError("run", expected=expected, received=received, hint="run dgd predict with --model.draft")
    stats: dict[str, ArmStats] = {}
    for row in read_predictions(run):
        collect(stats, row)
    fit = _session(draft / "provenance.json")
    text = CARD.format(
        target=without_paths(model["target"]),
        layers=config.num_layers,
        taps=", ".join(map(str, config.target_layer_ids)),
        block=config.block_size,
        mask=config.mask_token_id,
        table=_table(stats),
        hardware=_hardware(_session(run / "provenance.json").get("hardware", {})),
        command=shlex.join(["dgd", *fit.get("argv", ["", "(not known)"])[1:]]),
        version=fit.get("versions", {}).get("dgd-lightning", "(not known)"),
    )
    with whole_files(draft, card.name) as scratch:
        (scratch / card.name).write_text(text, encoding="utf-8")
    print(f"model card: {card}")
    return 0


def _table(stats: dict[str, ArmStats]) -> str:
    lines = ["| arm | temperature | tasks | τ | tokens/s | speed-up |", "|---|---|---|---|---|---|"]
    drafted = [arm for arm in stats.values() if arm.tasks and arm.block_size > 1 and arm.lossless]
    for arm in drafted:
        base = baseline_of(arm, stats)
        speed = f"{shown(speed_up(arm, stats), '{:.2f}×')}" if base else "–"
        numbers = f"{arm.tasks} | {shown(arm.tau.micro, '{:.2f}')} | {shown(arm.tokens_per_second, '{:.1f}')} | {speed}"
        lines.append(f"| {arm.name} | {arm.sampling[0]:g} | {numbers} |")
    if not drafted:
        expected = "rows of a lossless arm that drafts, such as `Speculative`"
        raise InputError("run", expected=expected, received=f"arms {', '.join(stats)}", hint="add such an arm")
    return "\n".join(lines)


def _hardware(found: dict[str, Any]) -> str:
    gpus = [gpu.get("name", "a GPU") if isinstance(gpu, dict) else str(gpu) for gpu in found.get("gpus", [])]
    return ", ".join(gpus) or f"a CPU ({found.get('machine', '?')}, {found.get('cpu_threads', '?')} threads)"


def _session(path: Path) -> dict[str, Any]:
    """The last session of a provenance file; empty where there is none."""
    sessions = json.loads(path.read_text(encoding="utf-8")).get("sessions", []) if path.is_file() else []
    return sessions[-1] if sessions else {}


def _settings(run: Path) -> dict[str, Any]:
    """Those of a predict run's model."""
    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        expected, received = "the folder of a predict run", f"{run}: {error}"
        raise InputError("run", expected=expected, received=received, hint="check the path") from error
