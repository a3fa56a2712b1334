"""Train a small Llama: accelerate launch --config_file launch/configs/fsdp2.yaml launch/examples/language_model.py"""

from sharded_shampoo4.integrations.quiet import quiet

quiet()  # before the imports of packages that give warnings

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sharded_shampoo4 import Shampoo4
from sharded_shampoo4.integrations.accelerate import PortableAccelerator
from sharded_shampoo4.integrations.rehearsal import rehearse_on_cpu
from sharded_shampoo4.integrations.views import split_groups

CONTEXT, EVERY = 128, 20  # bytes that the model sees; steps between two lines of output
LEARNING_RATES = {"shampoo4": 8e-3, "adamw": 4e-3}  # the best of 200 steps


def read_source_code():
    """Return the modules of Python's standard library as one tensor of bytes, the tokens of this model."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def make_model():
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_optimizer(name, model, lr):
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    # Each of the matrices that some models store joined, such as queries, keys and values, has statistics of its own.
    return Shampoo4(split_groups(model), lr=lr, weight_decay=0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="shampoo4")
    parser.add_argument("--lr", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rehearse_on_cpu()  # without a GPU: what the launcher asks for, over gloo
    accelerator = PortableAccelerator()
    torch.manual_seed(args.seed)
    model = make_model()
    optimizer = make_optimizer(args.optimizer, model, args.lr or LEARNING_RATES[args.optimizer])
    model, optimizer = accelerator.prepare(model, optimizer)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )

    text = read_source_code()
    generator = torch.Generator().manual_seed(args.seed)  # equal on every process
    total = 0.0
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (args.batch_size,), generator=generator).tolist()
        mine = starts[accelerator.process_index :: accelerator.num_processes]
        tokens = torch.stack([text[start : start + CONTEXT] for start in mine]).long().to(accelerator.device)
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += accelerator.reduce(loss.detach(), "mean").item()
        if step % EVERY == 0:
            accelerator.print(f"step {step}: loss {total / EVERY:.3f}")
            total = 0.0
    accelerator.end_training()


if __name__ == "__main__":
    main()
