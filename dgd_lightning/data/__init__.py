"""Contexts, prompts and `datasets` ids as tasks; chat rendering."""

from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.prompts import HubData, PromptsData
from dgd_lightning.data.tasks import TaskData

__all__ = ["ContextsData", "HubData", "PromptsData", "TaskData"]
