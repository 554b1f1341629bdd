"""Mixed-precision search: a supernet from any model with quantized layers, costs of its widths, and what it found.

net = ql.search.supernet(model, bits=range(2, 9), input_shape=(3, 32, 32))
loss = task(net(x), y) + 3e-5 * ql.search.costs.complexity(net)
found, plain = ql.search.read_bits(net), ql.search.fixed(net)
"""

from quantlib.search import costs as costs
from quantlib.search.costs import figures as figures
from quantlib.search.geometry import Geometry as Geometry
from quantlib.search.geometry import SearchError as SearchError
from quantlib.search.history import History as History
from quantlib.search.mixed import MixedActivation as MixedActivation
from quantlib.search.mixed import MixedWeights as MixedWeights
from quantlib.search.supernet import Bits as Bits
from quantlib.search.supernet import fixed as fixed
from quantlib.search.supernet import layers as layers
from quantlib.search.supernet import make_bits as make_bits
from quantlib.search.supernet import read_bits as read_bits
from quantlib.search.supernet import split_parameters as split_parameters
from quantlib.search.supernet import supernet as supernet
