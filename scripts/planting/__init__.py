"""Plants register neurons, i.e. neurons that make outliers (patches of huge norm), into networks by setting weights.

So it is known which neurons calibration should find. `plant` and `plant_on_register` plant into random models, for
tests, `scripts/proof.py` and `scripts/trained_registers.py`; `plant_into` plants into pretrained networks. `mechanisms`
says what can be planted.
"""

from planting.mechanisms import Mechanism, Planted
from planting.pretrained import plant_into
from planting.random_models import plant, plant_on_register

__all__ = ["Mechanism", "Planted", "plant", "plant_into", "plant_on_register"]
