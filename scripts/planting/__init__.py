"""Plants register neurons, which are then known: into random models, and into pretrained networks.

`plant` and `plant_on_register` are for tests, `scripts/proof.py` and `scripts/trained_registers.py`, `plant_into` for
networks whose other weights are real. `mechanisms` says what can be planted.
"""

from planting.mechanisms import Mechanism, Planted
from planting.pretrained import plant_into
from planting.random_models import plant, plant_on_register

__all__ = ["Mechanism", "Planted", "plant", "plant_into", "plant_on_register"]
