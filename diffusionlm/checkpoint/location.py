"""The place of a checkpoint."""

import dataclasses
from typing import Any

from etils import epath

from diffusionlm import hub


@dataclasses.dataclass(frozen=True)
class Location:
    """The place of a checkpoint, and the newer steps of its run that are not whole."""

    path: epath.Path
    passed_over: tuple[str, ...] = ()
    address: hub.Address | None = None  # with its commit, of a model from the Hugging Face Hub

    def to_json(self) -> dict[str, Any]:
        """Return {"checkpoint": the directory or address, "passed_over": newer steps, of which a part is missing}."""
        return {"checkpoint": str(self.address or self.path), "passed_over": list(self.passed_over)}
