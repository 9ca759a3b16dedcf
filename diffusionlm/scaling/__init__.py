"""IsoFLOP sweeps from plan to law to next run: `sweep`, then `laws`, then `report`, then `commands` over them all."""
