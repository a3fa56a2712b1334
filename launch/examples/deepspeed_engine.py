"""Run under DeepSpeed: torchrun --standalone --nproc_per_node 2 launch/examples/deepspeed_engine.py"""

from sharded_shampoo4.integrations.quiet import quiet

quiet()  # before the imports of packages that give warnings

from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sharded_shampoo4 import checkpoint
from sharded_shampoo4.integrations.deepspeed import skip_cpu_compilation  # makes "Shampoo4" a type of optimizer

FOLDER, EPOCHS = Path("runs/examples/deepspeed"), 10
CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "optimizer": {"type": "Shampoo4", "params": {"lr": 2e-3, "weight_decay": 0.05}},
    "zero_optimization": {"stage": 2},
}

skip_cpu_compilation()
deepspeed.init_distributed()
torch.manual_seed(0)

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
engine, *_ = deepspeed.initialize(model=model, config=CONFIG)

done = len(list(FOLDER.glob(f"*/{checkpoint.MANIFEST}")))  # complete checkpoints, one for each epoch
if done:
    checkpoint.load(engine, FOLDER / f"epoch-{done}")

for epoch in range(done + 1, EPOCHS + 1):
    loader.sampler.set_epoch(epoch)  # the order of the images
    for images, labels in loader:
        loss = nn.functional.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}")
    checkpoint.save(engine, FOLDER / f"epoch-{epoch}")
dist.destroy_process_group()
