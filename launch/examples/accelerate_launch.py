"""Run under Accelerate: accelerate launch --config_file launch/configs/ddp.yaml launch/examples/accelerate_launch.py"""

from pathlib import Path

import torch
from accelerate import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.integrations.accelerate import PortableAccelerator
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu

FOLDER, EPOCHS = Path("runs/examples/accelerate"), 10

rehearse_on_cpu()  # without a GPU: what the launcher asks for, over gloo
accelerator = PortableAccelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
torch.manual_seed(0)

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
loader = DataLoader(data, batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = Shampoo4(model.named_parameters(), lr=2e-3, weight_decay=0.05)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

done = len(list(FOLDER.glob(f"*/shampoo4/{checkpoint.MANIFEST}")))  # complete checkpoints, one for each epoch
if done:
    accelerator.load_state(FOLDER / f"epoch-{done}")

for epoch in range(done + 1, EPOCHS + 1):
    loader.set_epoch(epoch)  # the order of the images
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
    accelerator.save_state(FOLDER / f"epoch-{epoch}")
accelerator.end_training()
