"""The tail rule: from an integer accumulator to the next quantizer by running the trained modules, never by algebra.

Between an integer edge and a quantizer lie elementwise steps with per-channel constants. They are kept as an expression (Map over
Edges). At the quantizer the expression runs in float64 on integers of the edge's interval, laid on the batch axis, (P, C, 1, 1): on
all of them up to 4,096, else by bisection where monotonicity is declared. The codes that come back are the definition; Threshold,
Requant, Lut and Join only store them.
"""

from quantlib.tails.expressions import ConversionError as ConversionError
from quantlib.tails.expressions import Edge as Edge
from quantlib.tails.expressions import Map as Map
from quantlib.tails.expressions import Move as Move
from quantlib.tails.expressions import RealInput as RealInput
from quantlib.tails.expressions import Value as Value
from quantlib.tails.expressions import channel_scale as channel_scale
from quantlib.tails.expressions import evaluate as evaluate
from quantlib.tails.expressions import every as every
from quantlib.tails.expressions import frontier as frontier
from quantlib.tails.expressions import layout as layout
from quantlib.tails.expressions import monotone as monotone
from quantlib.tails.expressions import substitute as substitute
from quantlib.tails.moves import pull as pull
from quantlib.tails.moves import pull_all as pull_all
from quantlib.tails.moves import settle as settle
from quantlib.tails.probing import codes_of as codes_of
from quantlib.tails.probing import compress as compress
from quantlib.tails.probing import edge_scale as edge_scale
from quantlib.tails.probing import integers as integers
from quantlib.tails.probing import real_of as real_of
