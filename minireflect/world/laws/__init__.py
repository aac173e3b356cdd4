"""The laws of this small physical world, one file each.

The prompt sets, the training pictures, the inspector and every plot read only the interface in `law.py`, so a ninth
law is one class of about 40 lines, and its name below.  Coordinates are pixels of a 64x64 picture, y pointing down.
"""

from .balance import Balance
from .buoyancy import Buoyancy
from .flame import Flame
from .gravity import Gravity
from .law import Law
from .magnet import Magnet
from .mirror import Mirror
from .shadow import Shadow
from .vessels import Vessels

LAWS: dict[str, Law] = {
    law.name: law
    for law in (Balance(), Buoyancy(), Shadow(), Mirror(), Magnet(), Vessels(), Gravity(), Flame())
}
