"""What tools/tune.py searches: kernels with their candidates, and how results are judged."""

from tools.tuning import attention, rows
from tools.tuning.cases import Tunable

TUNABLE: dict[str, Tunable] = {t.kernel: t for t in (*attention.TUNABLE, *rows.TUNABLE)}
