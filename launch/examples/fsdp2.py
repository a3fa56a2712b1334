"""Run under FSDP2: torchrun --standalone --nproc_per_node 2 launch/examples/fsdp2.py"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from sharded_shampoo4 import Shampoo4, checkpoint

FOLDER, EPOCHS = Path("runs/examples/fsdp2"), 10

device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
if device.type != "cpu":
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
torch.manual_seed(0)

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
for layer in model[::2]:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = Shampoo4(model.named_parameters(), lr=2e-3, weight_decay=0.05)

done = len(list(FOLDER.glob(f"*/{checkpoint.MANIFEST}")))  # complete checkpoints, one for each epoch
if done:
    checkpoint.load(optimizer, FOLDER / f"epoch-{done}", model=model)

for epoch in range(done + 1, EPOCHS + 1):
    loader.sampler.set_epoch(epoch)  # the order of the images
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}")
    checkpoint.save(optimizer, FOLDER / f"epoch-{epoch}", model=model)
dist.destroy_process_group()
