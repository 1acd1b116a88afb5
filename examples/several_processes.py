"""Two processes that train with DistributedDataParallel and SyncBatchNorm do what one does with both halves of a batch.

And saving: a state_dict, a whole model, a checkpoint with the optimiser's state to go on from.
"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from common import arguments, axes, digits, each, finding, save

import fastnorm
from fastnorm import models

BATCH = 64


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.lenet_bn(activation="relu").double()  # so that what is compared is not roundings


def steps(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, first: int, last: int
) -> list[float]:
    """The losses of some steps; each process has its part of each batch."""
    images, labels, _, _ = digits()
    losses = []
    numbers = range(first, last)
    for i in each(numbers, f"{world} process{'es' * (world > 1)}") if rank == 0 else numbers:
        batch = (torch.arange(BATCH) + i * BATCH)[rank::world] % len(labels)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch].double()), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank: int, world: int, count: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = fastnorm.SyncBatchNorm.convert_sync_batchnorm(build())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    losses = torch.tensor(steps(wrapped, optimiser(wrapped), rank, world, 0, count))
    dist.all_reduce(losses)
    if rank == 0:
        torch.save({"model": model.state_dict(), "losses": losses / world}, os.path.join(folder, "two.pt"))
    dist.destroy_process_group()


def optimiser(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def main() -> None:
    args = arguments(__doc__, steps=(30, 6))
    one = build()
    optimizer = optimiser(one)
    losses = steps(one, optimizer, 0, 1, 0, args.steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, path / "checkpoint.pt")
        torch.save(one, path / "whole.pt")
        losses += steps(one, optimizer, 0, 1, args.steps // 2, args.steps)

        again = build()
        restored = optimiser(again)
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        again.load_state_dict(checkpoint["model"])
        restored.load_state_dict(checkpoint["optimizer"])
        whole = torch.load(path / "whole.pt", weights_only=False)
        same_whole = distance(whole.state_dict(), again.state_dict()) == 0
        steps(again, restored, 0, 1, args.steps // 2, args.steps)

        torch.multiprocessing.spawn(work, (2, args.steps, folder), nprocs=2)
        two = torch.load(path / "two.pt", weights_only=True)
    apart = distance(one.state_dict(), two["model"])
    figure, (axis,) = axes(1, "training loss")
    axis.plot(losses, label="one process")
    axis.plot(two["losses"], "--", label="two processes")
    axis.set_xlabel("step")
    axis.legend()
    save(figure, args, __file__)
    if torch.cuda.device_count() > 1:
        parallel = torch.nn.DataParallel(one.cuda())
        print(f"DataParallel over {torch.cuda.device_count()} GPUs: {parallel(digits()[0][:BATCH].double()).shape}")
    print(f"largest difference of parameters and statistics after {args.steps} steps: {apart:.1e}")
    finding("two processes equal one", apart < 1e-9)
    finding("a whole model loads as it was saved", same_whole)
    finding(
        "training goes on from a checkpoint as if it had not stopped",
        distance(one.state_dict(), again.state_dict()) == 0,
    )


if __name__ == "__main__":
    main()
