"""Run under the Trainer of transformers: torchrun --standalone --nproc_per_node 2 launch/examples/trainer.py"""

from sharded_shampoo4.integrations.quiet import quiet

quiet()  # before the imports of packages that give warnings

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments

from sharded_shampoo4.integrations.transformers import PortableTrainer, shampoo4

FOLDER, EPOCHS = Path("runs/examples/trainer"), 10

args = TrainingArguments(
    FOLDER,
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    weight_decay=0.05,
    lr_scheduler_type="constant",
    logging_strategy="epoch",
    save_strategy="epoch",
    ddp_find_unused_parameters=False,
    use_cpu=not torch.accelerator.is_available(),
    dataloader_pin_memory=torch.accelerator.is_available(),
)
torch.manual_seed(0)

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
data = [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]


class Model(nn.Sequential):
    def forward(self, images, labels):
        logits = super().forward(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


model = Model(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
trainer = PortableTrainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=shampoo4(args))
trainer.train(resume_from_checkpoint=any(FOLDER.glob("*/trainer_state.json")))
