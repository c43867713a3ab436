"""Help of `dgd fit|validate|test|predict`, made of the sources: what to give, and what each class takes.

`--help` is short; `--help.trainer` has Lightning's options, `--model.help [CLASS]`, `--data.help [CLASS]` and, for any
argument whose value is made of arguments, `--model.ttt.help` have ours.
"""

import shutil
import textwrap
from collections.abc import Sequence

from dgd_lightning.commands import catalogue
from dgd_lightning.commands.catalogue import Parameters
from dgd_lightning.commands.given import OPTIONS, class_of, given

ABOUT = {
    "predict": "Decode tasks with a target and its draft, by every arm.",
    "fit": "Train a draft or a miniature target, or adapt a draft to one context.",
    "validate": "Run the validation loop of a training module.",
    "test": "Read gold answers with target, draft, controls and layers; or run the test loop of a training module.",
}
LIGHTNING = {
    "seed_everything": "seed of what is drawn outside of the arms; default: 0",
    "ckpt_path": "a checkpoint of a training module to go on with",
    "print_config": "print the whole configuration, and end",
}
KINDS = {  # what YAML names, and its base class
    "model": "LightningModule",
    "data": "LightningDataModule",
    "trainer.callbacks": "Callback",
}


def text(argv: Sequence[str]) -> str | None:
    """What is to be printed; None where no help is asked for, or one that only the parser can give."""
    for place, argument in enumerate(argv):
        option, _, wanted = argument.partition("=")
        if option in ("-h", "--help"):
            return _short(argv[0])
        if option in ("--help.trainer", "--trainer.help"):
            found = catalogue.trainer_parameters()
            return None if found is None else _listed("Lightning's Trainer:", "--trainer", found)
        if option.startswith("--") and option.endswith(".help"):
            following = argv[place + 1] if not wanted and place + 1 < len(argv) else wanted
            return _of(option[2:].removesuffix(".help"), "" if following.startswith("-") else following, argv)
    return None


def _short(subcommand: str) -> str:
    options = {"config": "a YAML file, or a name that `dgd configs` lists; of several, later ones count", **OPTIONS}
    classes = [
        f"{title}\n{_classes(kind)}"
        for title, kind in (
            ("--model CLASS, with --model.KEY VALUE:", "LightningModule"),
            ("--data CLASS, with --data.KEY VALUE:", "LightningDataModule"),
            ("--trainer.callbacks+ CLASS, with init_args; every run has those that it needs:", "Callback"),
            ("methods of arms:", "Method"),
            ("readouts of methods:", "Readout"),
            ("schedules of β:", "Schedule"),
        )
    ]
    return "\n\n".join(
        [
            f"usage: dgd {subcommand} --config FILE.yaml [--key value ...]\n\n{ABOUT[subcommand]}",
            "\n".join(_entry(f"--{name}", about) for name, about in (options | LIGHTNING).items()),
            *classes,
            "Every key of a YAML file is an option. What a class takes:\n"
            "  --model.help Decoding, --data.help ContextsData, --trainer.callbacks.help CLASS\n"
            "  --model.arms.help, --model.arms.method.help Guided, --model.arms.method.readout.help LogitLens\n"
            "  --model.ttt.help, --data.subset.help, and so on\n"
            "  --help.trainer: Lightning's own options, --trainer.KEY VALUE",
        ]
    )


def _of(path: str, wanted: str, argv: Sequence[str]) -> str | None:
    """Help of an argument: what its class takes, or which classes there are."""
    kinds, inside = [], path
    option, known = path.removeprefix("trainer."), catalogue.trainer_parameters() or {}
    if path.startswith("trainer.") and option in known and not wanted and option != "callbacks":
        names = catalogue.in_lightning_by(option.capitalize())
        classes = "".join(f"\n  {name}" for name in names if name != "Logger")
        return _listed("Lightning's Trainer:", "--trainer", {option: known[option]}) + classes
    for start, base in KINDS.items():
        if path == start or path.startswith(f"{start}."):
            kinds, inside = [base], path[len(start) + 1 :]
            given_class = class_of(start, given(argv))[0]
            if given_class is not None and catalogue.ours(given_class.rpartition(".")[2]):
                kinds = [given_class.rpartition(".")[2]]
    for name in filter(None, inside.split(".")):
        if name == "init_args":
            continue
        owners = [owner for kind in kinds for owner in ([kind] * catalogue.ours(kind) + catalogue.below(kind))]
        holders = [found[name] for owner in owners if name in (found := catalogue.parameters(owner) or {})]
        kinds = catalogue.classes_in(holders[0].kind) if holders else []
    if wanted:
        wanted = wanted.rpartition(".")[2] if wanted.startswith("dgd_lightning.") else wanted
        return _taken(path, wanted) if any(wanted in (kind, *catalogue.below(kind)) for kind in kinds) else None
    several = [kind for kind in kinds if catalogue.below(kind)]
    if several:
        lists = "\n".join(map(_classes, several))
        return (
            f"--{path} CLASS, or its class_path and init_args in YAML:\n{lists}\n\nWhat one takes: --{path}.help CLASS"
        )
    return _taken(path, kinds[0]) if kinds else None


def _taken(path: str, name: str) -> str | None:
    found = catalogue.parameters(name)
    return None if found is None else _listed(f"{name}: {catalogue.about(name)}", f"--{path}", found)


def _listed(title: str, option: str, found: Parameters) -> str:
    lines = [textwrap.fill(title, _width()), ""]
    for name, one in found.items():
        known = ", ".join(filter(None, [one.kind, "required" if one.default is None else f"default {one.default}"]))
        lines.append(_entry(f"{option}.{name}", f"{one.about} ({known})".strip()))
    return "\n".join(lines)


def _classes(kind: str) -> str:
    found = [name for name in catalogue.below(kind) if catalogue.concrete(name)]
    return "\n".join(_entry(name, catalogue.about(name)) for name in found)


def _entry(name: str, about: str) -> str:
    """A name, and what it is in a column of its own; names are not broken."""
    indent = " " * 26
    wrapper = textwrap.TextWrapper(_width(), indent, indent, break_on_hyphens=False, break_long_words=False)
    lines = wrapper.wrap(about)
    if len(name) < 23 and lines:
        lines[0] = f"  {name:23} {lines[0].strip()}"
        return "\n".join(lines)
    return "\n".join([f"  {name}", *lines])


def _width() -> int:
    return min(shutil.get_terminal_size((120, 24)).columns, 120)
