from planting.mechanisms import Mechanism, Planted
from planting.random_models import plant

__all__ = ["Mechanism", "Planted", "plant"]
