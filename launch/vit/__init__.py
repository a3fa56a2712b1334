"""The parts of train_vit.py: its options, data, models, optimizers, progress and reports."""

import logging

from sharded_shampoo4.integrations.quiet import quiet

quiet()
logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # of retries: the error says it all
