"""Run in one process: python launch/examples/plain.py"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_shampoo4 import Shampoo4, checkpoint

FOLDER, EPOCHS = Path("runs/examples/plain"), 10

device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
torch.manual_seed(0)

images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
loader = DataLoader(data, batch_size=32, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
optimizer = Shampoo4(model.named_parameters(), lr=2e-3, weight_decay=0.05)

done = len(list(FOLDER.glob(f"*/{checkpoint.MANIFEST}")))  # complete checkpoints, one for each epoch
if done:
    checkpoint.load(optimizer, FOLDER / f"epoch-{done}", model=model)

for epoch in range(done + 1, EPOCHS + 1):
    torch.manual_seed(epoch)  # the order of the images
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
    checkpoint.save(optimizer, FOLDER / f"epoch-{epoch}", model=model)
