"""Registry of drafters. To add one, write a class as in drafter.py, in a file of its own, and add it here."""

from __future__ import annotations

from genarm_fast.speculation.drafter import Drafter, DraftExecutor
from genarm_fast.speculation.model_drafter import ModelDrafter
from genarm_fast.speculation.ngram_drafter import NgramDrafter


def make_drafters(executor: DraftExecutor, groups: list[list[int]], names: list[str]) -> list[Drafter]:
    """Return all drafters of a model. A fixed number of drafts without a chosen drafter uses the first one.

    groups: members by runner, the base's runner first. names: names of all members, "draft_model" included.
    """
    models: list[Drafter] = [
        ModelDrafter(executor, g, tuple(group), tuple(names[m] for m in group)) for g, group in enumerate(groups)
    ]
    own = models if len([g for g in groups if executor.draft_model not in g]) > 1 else []
    draft_models = [model for model in models if executor.draft_model in model.members]
    first = [model for model in own[1:] if model not in draft_models]
    return [*first, *draft_models, NgramDrafter(executor), *own[:1]]
