# What type checkers and editors see: `__init__.py` imports these when they are asked for.
from testreg.calibration.calibrate import calibrate as calibrate
from testreg.calibration.errors import ImmovableOutliersError as ImmovableOutliersError
from testreg.calibration.errors import NoOutliersError as NoOutliersError
from testreg.extensions.hooks import hooks_without_registers as hooks_without_registers
from testreg.extensions.static_parts import fold as fold
from testreg.extensions.steering import steered as steered
from testreg.families import Family as Family
from testreg.families import add_family as add_family
from testreg.io.checkpoints import load as load
from testreg.io.checkpoints import save as save
from testreg.io.loading import demo_model as demo_model
from testreg.io.loading import load_model as load_model
from testreg.measure.answers import answer_attention as answer_attention
from testreg.measure.diagnose import diagnose as diagnose
from testreg.measure.diagnosis import Diagnosis as Diagnosis
from testreg.measure.make_static import make_static as make_static
from testreg.measure.maps import attention as attention
from testreg.measure.maps import features as features
from testreg.measure.maps import strip_registers as strip_registers
from testreg.measure.outliers import OutlierRule as OutlierRule
from testreg.measure.repair import repair as repair
from testreg.measure.repair import unrepair as unrepair
from testreg.neurons import RegisterNeurons as RegisterNeurons
from testreg.neurons import UnverifiedNeuronsWarning as UnverifiedNeuronsWarning
from testreg.neurons import bundled as bundled
from testreg.register import disabled as disabled
from testreg.register import is_patched as is_patched
from testreg.register import patch as patch
from testreg.register import patched as patched
from testreg.register import registers as registers
from testreg.register import unpatch as unpatch
from testreg.report.comparison import Comparison as Comparison
from testreg.report.comparison import compare as compare
from testreg.static import StaticRegisters as StaticRegisters

__version__: str
