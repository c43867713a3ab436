"""`PowerMetrics`: what chains and populations of power sampling did, in TensorBoard and in a table."""

from collections import defaultdict
from typing import Any

from lightning.pytorch import Trainer

from dgd_lightning.analysis.chains import Chains
from dgd_lightning.callbacks.rows import RowSums, add_scalars, tensorboard
from dgd_lightning.report.figures import chain_figure
from dgd_lightning.report.run_tables import chains_table


class PowerMetrics(RowSums):
    """Logs, per arm whose rows have ``power``: share of proposals taken, log p along the chains, effective sample size.

    The picture is of the first chain of each arm. Runs without such rows get nothing.
    """

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.arms: dict[str, Chains] = defaultdict(Chains)

    def reset(self) -> None:
        self.arms = defaultdict(Chains)

    def add(self, row: dict[str, Any]) -> None:
        if row["dgd"].get("power"):
            self.arms[row["dgd"]["arm"]].add(row)

    def draw(self, writer: Any) -> None:
        for name, chains in self.arms.items():
            add_scalars(writer, chains.scalars(), chains.answers, f"{name}/power/")

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Final curves and pictures; a table in detail."""
        if self.arms:
            module.summary.details.append(chains_table(self.arms))
        if (writer := tensorboard(trainer)) is None:
            return
        self.draw(writer)
        for name, chains in self.arms.items():
            for curve, values in chains.curves().items():
                for number, value in enumerate(values, 1):
                    writer.add_scalar(f"{name}/power/{curve}", value, number)
            if chains.example is not None and chains.example["cut"]:
                writer.add_figure(f"{name}/power/chain", chain_figure(name, chains.example), chains.answers)
        writer.flush()
