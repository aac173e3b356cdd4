"""One thread per worker: pytest-xdist already keeps every core busy, and two that share cores slow each other down."""

import torch

torch.set_num_threads(1)
