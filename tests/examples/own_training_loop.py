"""A flow model in plain torch, stopped and resumed in the middle of an epoch: python own_training_loop.py URI."""

import copy
import sys
from typing import Any

import latentloom as ll
import torch
from torch import nn

latents = ll.open_latents(sys.argv[1])
channels = len(latents.statistics.mean)


class Network(nn.Module):
    """Velocity of noisy latents [b, c, h, w] at times [b]."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.first, self.last = nn.Conv2d(channels, 32, 3, padding=1), nn.Conv2d(32, channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x_BCHW) + self.time(t_B[:, None])[:, :, None, None]
        return self.last(torch.nn.functional.silu(hidden))


class Training:
    """Network, optimizer and stream: what a checkpoint holds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Network()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        self.batches = latents.stream(batch_size=16, seed=0)

    def run(self, steps: int) -> list[float]:
        losses: list[float] = []
        while len(losses) < steps:
            for batch in self.batches:  # one epoch, or what is left of it
                torch.manual_seed(batch["step"])
                clean = batch["latents"]
                noise, t = torch.randn_like(clean), torch.rand(len(clean))
                mixed = torch.lerp(clean, noise, t[:, None, None, None])
                loss = (self.network(mixed, t) - (noise - clean)).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
                if len(losses) == steps:
                    break
        return losses

    def parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimizer": self.optimizer, "batches": self.batches}


whole = Training().run(40)

stopped = Training()
before = stopped.run(15)
checkpoint = {name: copy.deepcopy(part.state_dict()) for name, part in stopped.parts().items()}

resumed = Training()
for name, part in resumed.parts().items():
    part.load_state_dict(checkpoint[name])
after = resumed.run(25)

print(f"loss {sum(whole[:5]) / 5:.3f} -> {sum(whole[-5:]) / 5:.3f}, resumed exactly: {before + after == whole}")
