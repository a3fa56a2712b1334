"""Parts of benchmark.py: optimizers, measurements, tables and pictures."""

import logging

# transformers imports torchao wherever it is installed, as with '.[bench]'. torchao then warns of kernels for other
# machines, and torch of torchao's calls: nothing that whoever measures here can change.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
